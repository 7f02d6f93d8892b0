"""Brings a transformers model's weights into the form that the CPU kernel decodes.

The kernel knows Llama, Mistral, Qwen2 and Qwen3, whose layers differ in little, and GPT-Neo. If a
configuration asks for something that the kernel does not have, the model keeps PyTorch.

This module knows nothing of decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specsampling.kernel import engine, weights
from specsampling.method.step import ROTATED, layer_kinds

MOST_HEAD_DIM = 256
MOST_LAYERS = 512
CHANGING = ("dynamic", "longrope")  # frequencies that depend on a call's largest position

Pack = Callable[..., weights.Packed]  # name, module, rows and columns -> a layer


class Form(NamedTuple):
    """The parts of a kind of model: the kernel's names for them, and paths within a layer."""

    layers: str
    norm: str
    linears: dict[str, str]
    norms: dict[str, str]
    activations: tuple[str, ...]


LLAMA = Form(
    layers="layers",
    norm="norm",
    linears={
        **{name: f"self_attn.{name[0]}_proj" for name in ("query", "key", "value", "output")},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    },
    norms={"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    activations=("silu", "swish"),
)
HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
GPT_NEO = Form(
    layers="h",
    norm="ln_f",
    linears={
        **{name: f"attn.attention.{name[0]}_proj" for name in ("query", "key", "value")},
        **{"output": "attn.attention.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    },
    norms={"norm1": "ln_1", "norm2": "ln_2"},
    activations=("gelu_new", "gelu_pytorch_tanh"),
)
FORMS = {
    **dict.fromkeys(ROTATED, LLAMA),
    "qwen3": LLAMA._replace(norms=LLAMA.norms | HEAD_NORMS),
    "gpt_neo": GPT_NEO,
}


def why_not(model: PreTrainedModel) -> str:
    """Say what keeps a model from the kernel; "" if nothing does."""
    config: Any = model.config
    base: Any = model.base_model
    kind = config.model_type
    if kind not in FORMS:
        return f"the kernel does not know {kind} models"
    if not type(model).__module__.startswith("transformers.models."):
        return f"{type(model).__name__} is a class of its own"
    if changed := [name for name, part in model.named_modules() if _is_hooked(part)]:
        return f"{changed[0] or kind} computes something of its own"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in CHANGING or rope.get("partial_rotary_factor", 1) != 1:
        return f"the kernel does not know positions of the type {rope.get('rope_type')}"
    dim = head_dim_of(config)
    if dim % 2 or dim > MOST_HEAD_DIM or config.num_hidden_layers > MOST_LAYERS:
        return f"the kernel takes no heads of {dim} numbers in {config.num_hidden_layers} layers"
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "")
    form = FORMS[kind]
    if activation not in form.activations:
        return f"the kernel does not know the activation {activation}"
    for layer in base.get_submodule(form.layers):
        for linear in map(layer.get_submodule, form.linears.values()):
            if type(linear) is not nn.Linear:
                return f"the kernel does not know layers of the class {type(linear).__name__}"
    return ""


def head_dim_of(config: Any) -> int:
    """Return the size of an attention head."""
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _is_hooked(part: nn.Module) -> bool:
    """Say whether a module computes something other than its class does."""
    hooks = (part._forward_hooks, part._forward_pre_hooks)
    return any(hooks) or "forward" in vars(part)


def pack_model(
    model: PreTrainedModel,
    library: Any,
    pack: Pack,
    head: nn.Linear,
    head_tokens: Tensor | None = None,
) -> engine.Model:
    """Bring a model that the kernel, `library`, knows into its form.

    Args:
        pack: makes a layer of a linear module's name, the module, and the order of its rows and
            columns.
        head: the last linear layer.
        head_tokens: [n] ids that the head scores; None if it scores all.
    """
    config: Any = model.config
    base: Any = model.base_model
    form = FORMS[config.model_type]
    is_neo = form is GPT_NEO
    dim, heads = head_dim_of(config), config.num_attention_heads
    key_heads = heads if is_neo else config.num_key_value_heads
    inner = config.intermediate_size or 4 * config.hidden_size
    queries, keys, wide = _order(heads, dim), _order(key_heads, dim), _order(1, inner)
    rows = {"query": queries, "key": keys, "value": keys, "gate": wide, "up": wide}
    columns = {"output": queries}
    if is_neo:
        windows = [config.window_size * (kind == "local") for kind in config.attention_layers]
    else:
        kinds = layer_kinds(config)
        windows = [config.sliding_window if kind.startswith("sliding") else 0 for kind in kinds]
    layers = []
    for i, layer in enumerate(base.get_submodule(form.layers)):
        prefix = f"{model.base_model_prefix}.{form.layers}.{i}"
        linears = {}
        for name, path in form.linears.items():
            order = (rows.get(name), columns.get(name))
            linears[name] = pack(f"{prefix}.{path}", layer.get_submodule(path), *order)
        layers.append(engine.Parts(linears, _norms(layer, form.norms), windows[i]))
    packed_head = pack("lm_head", head)
    embedding: Any = model.get_input_embeddings()
    tensors = _norms(base, {"norm": form.norm}) | {"embedding": _pad(embedding.weight)}
    if is_neo:
        tensors["learned_positions"] = _pad(base.wpe.weight)
    if head_tokens is not None:
        tensors["head_tokens"] = head_tokens.to(torch.int32).contiguous()
    return engine.Model(
        library=library,
        layers=layers,
        head=packed_head,
        tensors=tensors,
        sizes=_sizes(model, head.out_features, packed_head.format == "float32"),
        epsilon=config.layer_norm_epsilon if is_neo else config.rms_norm_eps,
        score_scale=1.0 if is_neo else float(base.layers[0].self_attn.scaling),
        rotation=None if is_neo else partial(_rotation, copy.deepcopy(base.rotary_emb)),
    )


def _sizes(model: PreTrainedModel, head_rows: int, is_float: bool) -> dict[str, int]:
    """Collect a model's sizes and its tables' types; `is_float` if its weights are float32."""
    config: Any = model.config
    base: Any = model.base_model
    embedding: Any = model.get_input_embeddings()
    places = base.wpe.weight if config.model_type == "gpt_neo" else torch.empty(0, 0)
    dim, heads = head_dim_of(config), config.num_attention_heads
    inner = config.intermediate_size or 4 * config.hidden_size
    return {
        "vocabulary": embedding.num_embeddings,
        "embedding_format": weights.PLAIN[embedding.weight.dtype],
        "head_rows": head_rows,
        "hidden": config.hidden_size,
        "hidden_padded": weights.padded(config.hidden_size, weights.GROUP),
        "inner": weights.padded(inner, weights.GROUP),
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": dim,
        "head_padded": weights.padded(dim, weights.GROUP),
        "positions": len(places),
        "positions_format": weights.PLAIN[places.dtype],
        "cache_format": weights.PLAIN[torch.float32 if is_float else torch.float16],
    }


def _order(num: int, size: int) -> Tensor | None:
    """Order `num` parts of one size, each padded to whole groups; None if none needs padding."""
    places = torch.arange(weights.padded(size, weights.GROUP))
    if len(places) == size:
        return None
    return (places + size * torch.arange(num)[:, None]).masked_fill(places >= size, -1).flatten()


def _norms(owner: nn.Module, paths: dict[str, str]) -> dict[str, Tensor]:
    """Collect the weights and biases of some norms by the kernel's names, padded, in float32."""
    found = {}
    for name, norm in ((name, owner.get_submodule(path)) for name, path in paths.items()):
        found[name] = _pad(norm.weight.float())
        if (bias := getattr(norm, "bias", None)) is not None:
            found[f"{name}_bias"] = _pad(bias.float())
    return found


def _pad(weight: Any) -> Tensor:
    """Copy a weight, [..., d], with d padded to whole groups. A copy keeps no checkpoint open."""
    missing = weights.padded(weight.shape[-1], weights.GROUP) - weight.shape[-1]
    return nn.functional.pad(weight.data, (0, missing)) if missing else weight.data.clone()


def _rotation(rotary: nn.Module, num: int) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the first positions, [num, head_dim / 2] each."""
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, 1, 1), torch.arange(num)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]
