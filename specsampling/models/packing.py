"""A transformers model's weights in the form that the CPU kernel decodes.

The kernel knows Llama, Mistral, Qwen2 and Qwen3, whose layers differ in little, and GPT-Neo. What
else a configuration may ask for is looked up here: a model that needs more keeps PyTorch.

Knows nothing of decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specsampling.kernel import engine, weights
from specsampling.method.step import ROTATED, layer_kinds

GELU_NEW = ("gelu_new", "gelu_pytorch_tanh")
MOST_HEAD_DIM = 256
MOST_LAYERS = 512
CHANGING = ("dynamic", "longrope")  # frequencies that depend on a call's largest position

Pack = Callable[..., weights.Packed]  # name, weight, bias, rows and columns -> a layer


def why_not(model: PreTrainedModel) -> str:
    """What keeps a model from the kernel, in words; "" where nothing does."""
    config: Any = model.config
    kind = config.model_type
    if kind not in (*ROTATED, "gpt_neo"):
        return f"it does not know {kind} models"
    if not type(model).__module__.startswith("transformers.models."):
        return f"{type(model).__name__} is a class of its own"
    if changed := [name for name, part in model.named_modules() if _is_hooked(part)]:
        return f"{changed[0] or kind} computes something of its own"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in CHANGING or rope.get("partial_rotary_factor", 1) != 1:
        return f"positions of the type {rope.get('rope_type')}"
    dim = head_dim_of(config)
    if dim % 2 or dim > MOST_HEAD_DIM or config.num_hidden_layers > MOST_LAYERS:
        return f"heads of {dim} numbers in {config.num_hidden_layers} layers"
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "")
    known = GELU_NEW if kind == "gpt_neo" else ("silu", "swish")
    if activation not in known:
        return f"the activation {activation}"
    strange = [part for part in _linears(model) if type(part) is not nn.Linear]
    if strange:
        return f"layers of the class {type(strange[0]).__name__}"
    return ""


def head_dim_of(config: Any) -> int:
    """The size of an attention head."""
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _is_hooked(part: nn.Module) -> bool:
    """Whether more than a module's own class says what it computes."""
    hooks = (part._forward_hooks, part._forward_pre_hooks)
    return any(hooks) or "forward" in vars(part)


def _linears(model: PreTrainedModel) -> list[nn.Module]:
    """The layers' linear parts, whatever these have become."""
    base: Any = model.base_model
    if model.config.model_type == "gpt_neo":
        return [
            part
            for block in base.h
            for attention in [block.attn.attention]
            for part in (
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj),
                *(block.mlp.c_fc, block.mlp.c_proj),
            )
        ]
    return [
        part
        for layer in base.layers
        for attention, mlp in [(layer.self_attn, layer.mlp)]
        for part in (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
    ]


def pack_model(
    model: PreTrainedModel,
    library: Any,
    pack: Pack,
    head: nn.Linear,
    head_tokens: Tensor | None = None,
) -> engine.Model:
    """A model in the kernel's form; its layers' own weights are let go of as it goes.

    Args:
        model: one that the kernel knows.
        library: the kernel.
        pack: makes a layer of a linear module's name, the module, and the order of its rows and
            columns.
        head: the last linear layer.
        head_tokens: [n] ids that the head scores, if these are not all.
    """
    make = _gpt_neo if model.config.model_type == "gpt_neo" else _llama
    return make(model, library, pack, head, head_tokens)


def _llama(
    model: PreTrainedModel, library: Any, pack: Pack, head: nn.Linear, head_tokens: Tensor | None
) -> engine.Model:
    config: Any = model.config
    base: Any = model.base_model
    sizes = _sizes(config, config.num_key_value_heads, config.intermediate_size)
    heads = _heads(sizes)
    kinds = layer_kinds(config)
    layers = []
    for i, layer in enumerate(base.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"model.layers.{i}"
        linears = {
            "query": pack(f"{name}.self_attn.q_proj", attention.q_proj, heads(sizes["heads"])),
            "key": pack(f"{name}.self_attn.k_proj", attention.k_proj, heads(sizes["key_heads"])),
            "value": pack(f"{name}.self_attn.v_proj", attention.v_proj, heads(sizes["key_heads"])),
            "output": pack(
                f"{name}.self_attn.o_proj", attention.o_proj, columns=heads(sizes["heads"])
            ),
            "gate": pack(f"{name}.mlp.gate_proj", mlp.gate_proj, _wide(config.intermediate_size)),
            "up": pack(f"{name}.mlp.up_proj", mlp.up_proj, _wide(config.intermediate_size)),
            "down": pack(f"{name}.mlp.down_proj", mlp.down_proj),
        }
        norms = {
            "norm1": _pad(layer.input_layernorm.weight),
            "norm2": _pad(layer.post_attention_layernorm.weight),
        }
        if config.model_type == "qwen3":
            norms["query_norm"] = _float(attention.q_norm.weight)
            norms["key_norm"] = _float(attention.k_norm.weight)
        window = config.sliding_window if kinds[i] == "sliding_attention" else 0
        layers.append(engine.Parts(linears, norms, window))
    return engine.Model(
        library=library,
        layers=layers,
        head=pack("lm_head", head),
        tensors=_tensors(base.embed_tokens, {"norm": _pad(base.norm.weight)}, sizes, head_tokens),
        sizes=sizes | {"head_rows": head.out_features},
        epsilon=config.rms_norm_eps,
        score_scale=float(base.layers[0].self_attn.scaling),
        rotation=partial(_rotation, copy.deepcopy(base.rotary_emb)),
    )


def _gpt_neo(
    model: PreTrainedModel, library: Any, pack: Pack, head: nn.Linear, head_tokens: Tensor | None
) -> engine.Model:
    config: Any = model.config
    base: Any = model.base_model
    inner = config.intermediate_size or 4 * config.hidden_size
    sizes = _sizes(config, config.num_attention_heads, inner)
    heads = _heads(sizes)
    layers = []
    for i, block in enumerate(base.h):
        attention, mlp, name = block.attn.attention, block.mlp, f"transformer.h.{i}"
        linears = {
            **{
                kind: pack(f"{name}.attn.attention.{short}_proj", part, heads(sizes["heads"]))
                for kind, short, part in (
                    ("query", "q", attention.q_proj),
                    ("key", "k", attention.k_proj),
                    ("value", "v", attention.v_proj),
                )
            },
            "output": pack(
                f"{name}.attn.attention.out_proj",
                attention.out_proj,
                columns=heads(sizes["heads"]),
            ),
            "up": pack(f"{name}.mlp.c_fc", mlp.c_fc, _wide(inner)),
            "down": pack(f"{name}.mlp.c_proj", mlp.c_proj),
        }
        norms = {
            "norm1": _pad(block.ln_1.weight),
            "norm1_bias": _pad(block.ln_1.bias),
            "norm2": _pad(block.ln_2.weight),
            "norm2_bias": _pad(block.ln_2.bias),
        }
        is_local = config.attention_layers[i] == "local"
        layers.append(engine.Parts(linears, norms, config.window_size if is_local else 0))
    tensors = _tensors(
        base.wte,
        {"norm": _pad(base.ln_f.weight), "norm_bias": _pad(base.ln_f.bias)},
        sizes,
        head_tokens,
    )
    tensors["learned_positions"] = _table(base.wpe.weight)
    sizes["positions"] = base.wpe.num_embeddings
    sizes["positions_format"] = weights.PLAIN[base.wpe.weight.dtype]
    return engine.Model(
        library=library,
        layers=layers,
        head=pack("lm_head", head),
        tensors=tensors,
        sizes=sizes | {"head_rows": head.out_features},
        epsilon=config.layer_norm_epsilon,
        score_scale=1.0,
    )


def _sizes(config: Any, key_heads: int, inner: int) -> dict[str, int]:
    dim = head_dim_of(config)
    return {
        "hidden": config.hidden_size,
        "hidden_padded": weights.padded(config.hidden_size, weights.GROUP),
        "inner": weights.padded(inner, weights.GROUP),
        "heads": config.num_attention_heads,
        "key_heads": key_heads,
        "head_dim": dim,
        "head_padded": weights.padded(dim, weights.GROUP),
        "positions": 0,
        "positions_format": 0,
    }


def _heads(sizes: dict[str, int]) -> Callable[[int], Tensor | None]:
    """The order of some heads' numbers, each head padded; None where there is no padding."""
    dim, wide = sizes["head_dim"], sizes["head_padded"]

    def order(num: int) -> Tensor | None:
        if dim == wide:
            return None
        places = torch.arange(wide) + dim * torch.arange(num)[:, None]  # [num, wide]
        return places.masked_fill(torch.arange(wide) >= dim, -1).flatten()

    return order


def _wide(inner: int) -> Tensor | None:
    """The order of an MLP's numbers, padded to whole groups."""
    wide = weights.padded(inner, weights.GROUP)
    if wide == inner:
        return None
    return torch.cat([torch.arange(inner), torch.full((wide - inner,), -1)])


def _tensors(
    embedding: nn.Embedding,
    norms: dict[str, Tensor],
    sizes: dict[str, int],
    head_tokens: Tensor | None,
) -> dict[str, Tensor]:
    tensors = norms | {"embedding": _table(embedding.weight)}
    sizes["vocabulary"] = embedding.num_embeddings
    sizes["embedding_format"] = weights.PLAIN[embedding.weight.dtype]
    if head_tokens is not None:
        tensors["head_tokens"] = head_tokens.to(torch.int32).contiguous()
    return tensors


def _float(weight: Tensor) -> Tensor:
    return weight.data.float().clone()


def _pad(weight: Tensor) -> Tensor:
    """[d] -> [d padded to whole groups] float32."""
    missing = weights.padded(len(weight), weights.GROUP) - len(weight)
    return nn.functional.pad(weight.data.float(), (0, missing)).clone()


def _table(weight: Tensor) -> Tensor:
    """[n, d] -> [n, d padded to whole groups]; a copy, which keeps no checkpoint's file."""
    missing = weights.padded(weight.shape[1], weights.GROUP) - weight.shape[1]
    return nn.functional.pad(weight.data, (0, missing)) if missing else weight.data.clone()


def _rotation(rotary: nn.Module, num: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first positions, [num, head_dim / 2] each."""
    positions = torch.arange(num)[None]
    with torch.inference_mode():
        tables = rotary(torch.zeros(1, 1, 1), positions)
    half = tables[0].shape[-1] // 2
    return tables[0][0, :, :half], tables[1][0, :, :half]
