"""One decode call as a function of tensors alone: ids and their positions in, logits out.

The step writes to the caches at the given positions, and makes the mask from these positions and
the caches' size. So no Python number that changes from call to call enters the step. The same
function runs eagerly and as a captured CUDA graph (`models/static.py`).

Llama, Qwen2, Qwen3, Mistral and GPT-Neo have such a step. This module replaces the code around
their layers. Layers, norms and heads are the model's own modules, whether replaced by faster ones
or not. Other models keep transformers' forward (`forward.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

ROTATED = ("llama", "qwen2", "qwen3", "mistral")  # they differ only inside their layers
GROUPED = "grouped"  # the beginning of `models.attention.NAME`
MAX_GROUPED_ROWS = 64  # the most rows of a call whose mask is repeated as that attention needs


class Buffers(NamedTuple):
    """The keys and values of texts, [texts, key heads, capacity, head_dim] for each layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, capacity: int, num_texts: int = 1) -> Buffers:
        # Zeros, because a masked nan times its weight of 0 would still be nan.
        config: Any = model.config
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        num_keys = getattr(config, "num_key_value_heads", num_heads)
        shape = (num_texts, num_keys, capacity, head_dim)
        dtype, device, layers = model.dtype, model.device, range(config.num_hidden_layers)
        keys, values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in layers] for _ in range(2)
        )
        return cls(keys, values)

    def filled(self, num_keys: int) -> Buffers:
        """Make views of the first `num_keys` positions."""
        return Buffers(
            [keys[:, :, :num_keys] for keys in self.keys],
            [values[:, :, :num_keys] for values in self.values],
        )


class _Cache:
    """The buffers in one call, with those methods of a transformers cache that the layers use."""

    def __init__(self, buffers: Buffers, positions: Tensor):
        self._buffers = buffers
        self._positions = positions

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        buffers = self._buffers.keys[layer], self._buffers.values[layer]
        for buffer, new in zip(buffers, (keys, values)):
            if self._positions.dim() == 1:
                buffer.index_copy_(2, self._positions, new.to(buffer.dtype))
            else:
                places = self._positions[:, None, :, None].expand(new.shape)
                buffer.scatter_(2, places, new.to(buffer.dtype))
        return buffers


def has_step(model: PreTrainedModel) -> bool:
    """Say whether `decode_step` can decode with a model."""
    config: Any = model.config
    is_patched = "forward" in vars(model)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return False  # its layers' keys and values lie on several devices
    if is_patched or not type(model).__module__.startswith("transformers.models."):
        return False  # it may compute something of its own
    if config.model_type == "gpt_neo":
        return config._attn_implementation == "eager"  # the only one beside flash attention
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in ROTATED
        # These types change all frequencies when a call's largest position passes an edge.
        and rope.get("rope_type", "default") not in ("dynamic", "longrope")
        and config._attn_implementation.startswith(("sdpa", "eager", GROUPED))
    )


def decode_step(model: PreTrainedModel, ids: Tensor, positions: Tensor, buffers: Buffers) -> Tensor:
    """Score a few tokens. Each sees the tokens before it in the buffers and in the call.

    Args:
        model: one for which `has_step` is true.
        ids: [rows] token ids of one text, or [texts, rows] of several.
        positions: where the ids stand, in the same shape; keys and values are written there.
        buffers: keys and values of these texts.

    Returns:
        [rows, V] or [texts, rows, V] logits, in the model's dtype or float32.
    """
    logits = model.get_output_embeddings()(hidden_states(model, ids, positions, buffers))
    return logits if ids.dim() == 2 else logits[0]


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Score hidden states, [1, rows, d] -> [rows, V]."""
    return model.get_output_embeddings()(hidden)[0]


def hidden_states(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    buffers: Buffers,
    is_filled: bool = False,
) -> Tensor:
    """Compute what `decode_step` gives to the head, [texts, rows, d].

    Args:
        model, ids, positions, buffers: see `decode_step`.
        is_filled: whether the buffers end with these tokens, and the tokens are either a single
            token or the first tokens of the text. Attention then needs no mask.
    """
    config: Any = model.config
    base: Any = model.base_model
    masks: dict[str, Tensor | None]
    cache = _Cache(buffers, positions)
    if ids.dim() == 1:
        ids, positions = ids[None], positions[None]
    embedded = model.get_input_embeddings()(ids)
    if config.model_type == "gpt_neo":
        known = positions.clamp(max=base.wpe.num_embeddings - 1)  # padding may be beyond
        hidden = (embedded + base.wpe(known)).to(base.ln_f.weight.dtype)
        masks = {
            "global": _mask(positions, buffers.keys[0]),
            "local": _mask(positions, buffers.keys[0], window=config.window_size),
        }
        for block, kind in zip(base.h, config.attention_layers):
            hidden = _gpt_neo_block(block, hidden, masks[kind], cache)
        return base.ln_f(hidden)
    hidden = embedded.to(base.norm.weight.dtype)  # float32 between layers in 8 bit
    rotation = base.rotary_emb(hidden, positions)
    masks = _masks(model, positions, buffers, is_filled)
    for layer, kind in zip(base.layers, layer_kinds(config)):
        hidden = layer(
            hidden,
            attention_mask=masks[kind],
            position_embeddings=rotation,
            position_ids=positions,
            past_key_values=cache,
        )
    return base.norm(hidden)


def layer_kinds(config: Any) -> list[str]:
    """List each layer's kind: "full_attention" or "sliding_attention"."""
    if config.model_type in ("qwen2", "qwen3"):
        return config.layer_types
    is_sliding = config.model_type == "mistral" and config.sliding_window is not None
    return ["sliding_attention" if is_sliding else "full_attention"] * config.num_hidden_layers


def _masks(
    model: PreTrainedModel, positions: Tensor, buffers: Buffers, is_filled: bool
) -> dict[str, Tensor | None]:
    """Make a mask for each kind of layer that the model has."""
    config: Any = model.config
    group = 1
    if config._attn_implementation.startswith(GROUPED) and positions.shape[1] <= MAX_GROUPED_ROWS:
        group = config.num_attention_heads // config.num_key_value_heads
    masks: dict[str, Tensor | None] = {}
    for kind in set(layer_kinds(config)):
        window = config.sliding_window if kind == "sliding_attention" else None
        sees_all = window is None or buffers.keys[0].shape[2] <= window
        if is_filled and sees_all and config._attn_implementation != "eager":
            masks[kind] = None
        else:
            masks[kind] = _mask(positions, buffers.keys[0], window, group)
    return masks


def _mask(positions: Tensor, keys: Tensor, window: int | None = None, group: int = 1) -> Tensor:
    """Make a mask to add, [texts, 1, group * rows, keys]: 0 where a row sees a key, else -inf.

    Args:
        positions: [texts, rows].
        keys: a layer's buffer.
        window: how many keys a row sees, its own included; None for all up to its own.
        group: query heads that share a key head; the mask is repeated for each of them.
    """
    key = torch.arange(keys.shape[2], device=keys.device)
    is_hidden = key > positions[:, :, None]
    if window is not None:
        is_hidden |= key <= positions[:, :, None] - window
    mask = torch.zeros(is_hidden.shape, dtype=keys.dtype, device=keys.device)
    return mask.masked_fill_(is_hidden, -torch.inf).repeat(1, group, 1)[:, None]


def _gpt_neo_block(block: Any, hidden: Tensor, mask: Tensor | None, cache: _Cache) -> Tensor:
    """Run a block, [texts, rows, d] -> [texts, rows, d]. Its attention does not scale products."""
    attention = block.attn.attention
    normed = block.ln_1(hidden)
    queries, keys, values = (
        project(normed).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys, values = cache.update(keys, values, attention.layer_id)
    seen = scaled_dot_product_attention(
        queries.to(keys.dtype), keys, values, attn_mask=mask, scale=1.0
    )
    seen = seen.transpose(1, 2).flatten(2).to(hidden.dtype)
    hidden = hidden + attention.out_proj(seen)
    return hidden + block.mlp(block.ln_2(hidden))
