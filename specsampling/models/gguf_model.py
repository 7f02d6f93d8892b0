"""Makes a transformers model of a GGUF file: all that its header says is applied, or refused.

A header states a model's sizes and positions in llama.cpp's words. If a key or a tensor were
skipped, the result would be another model, without an error. So each key of the architecture is
looked up in `ARCHITECTURES`, and each tensor must have a place. Anything else is refused in one
line. Values are dequantised in float32 and rounded once.

Sources: llama.cpp's converter (`conversion/base.py`, `llama.py`, `qwen.py`, `gpt2.py`,
`granite.py`), which writes these keys, and its reader (`src/llama-model.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specsampling.models.gguf_file import GgufFile, open_gguf

EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
ROPE_THETA = 10_000.0  # llama.cpp's, if a file names none
LOW_FREQUENCY, HIGH_FREQUENCY = 1.0, 4.0  # those of Llama 3.1, 3.2 and 3.3
LLAMA3_CONTEXT = 8192
ROUNDING = 1e-5  # the relative error of a frequency in float32


class Architecture(NamedTuple):
    """The way in which a GGUF architecture is written as a transformers configuration."""

    model_type: str  # its name in transformers
    fields: Mapping[str, str]  # header keys without prefix, and their configuration fields
    optional: tuple[str, ...] = ("vocab_size", "attention.head_count_kv")  # may be left out
    defaults: Mapping[str, Any] = {}  # configuration fields that differ from the class's own
    biases: Mapping[str, tuple[str, ...]] = {}  # configuration fields, and tensors that show them
    has_rope: bool = True  # whether positions are rotated
    interleaves: bool = False  # whether the converter reorders the rows of queries and keys


SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
LLAMA = Architecture(
    "llama",
    SIZES,
    interleaves=True,
    biases={"attention_bias": ATTENTION_BIASES, "mlp_bias": MLP_BIASES},
)
GRANITE_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
QWEN = Architecture("qwen2", SIZES, defaults={"use_sliding_window": False})

ARCHITECTURES = {
    "llama": LLAMA,
    "granite": LLAMA._replace(model_type="granite", fields=SIZES | GRANITE_SCALES),
    "qwen2": QWEN,
    "qwen3": QWEN._replace(model_type="qwen3", biases={"attention_bias": ATTENTION_BIASES}),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        optional=("vocab_size", "feed_forward_length"),
        has_rope=False,
    ),
}

ROPE_KEYS = (
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("attention.key_length", "attention.value_length"),
    *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length")),
    *(f"rope.scaling.yarn_{name}" for name in ("ext_factor", "beta_fast", "beta_slow")),
)
# Keys that change nothing if they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),  # llama.cpp reads it and does nothing with it
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the order in which all are written
    "use_parallel_residual": (False,),
}


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """Make the configuration that a file's header and its tensors' names describe.

    A ModelError names a key that is missing, or that changes the model and is not covered.
    """
    try:
        return _config(file)
    except (TypeError, ValueError) as error:
        file.refuse_file(f"has a key of another type than llama.cpp writes ({error})")


def _config(file: GgufFile) -> PreTrainedConfig:
    if file.architecture not in ARCHITECTURES:
        file.refuse("general.architecture", f"must be one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[file.architecture]
    fields = dict(architecture.defaults)
    for key, name in architecture.fields.items():
        if (value := _same_for_all_layers(file, key)) is not None:
            fields[name] = value
        elif key not in architecture.optional:
            file.refuse_own(key, "must be there")
        elif key == "attention.head_count_kv":
            fields[name] = fields["num_attention_heads"]
    rope_keys = ROPE_KEYS if architecture.has_rope else ()
    _require_covered(file, {*architecture.fields, *rope_keys})
    if architecture.has_rope:
        fields |= _positions(file, fields)
    for name, tensors in architecture.biases.items():  # no key names biases
        fields[name] = any(f"blk.0.{tensor}" in file.tensors for tensor in tensors)
    fields |= _vocabulary(file, fields)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    return AutoConfig.for_model(architecture.model_type, **fields)


def _same_for_all_layers(file: GgufFile, key: str) -> Any:
    value = file.own(key)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        file.refuse_own(key, "must be the same for all layers")
    return value[0]


def _require_covered(file: GgufFile, taken: set[str]) -> None:
    for full, value in file.header.items():
        key = full.removeprefix(f"{file.architecture}.")
        if key == full or key in taken or value in NEUTRAL.get(key, ()):
            continue
        neutral = " or ".join(str(value) for value in NEUTRAL.get(key, ()))
        file.refuse(full, f"must be {neutral}" if neutral else "is not applied here")


def _vocabulary(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Find the vocabulary's size, and the tokens that begin and end texts."""
    if EMBEDDING not in file.tensors:
        file.refuse_file("lacks tensors that the model needs", [EMBEDDING])
    num_rows = int(file.tensors[EMBEDDING].shape[-1])
    if fields.get("vocab_size", num_rows) != num_rows:
        file.refuse_own("vocab_size", f"must be {num_rows}, as {EMBEDDING} has")
    ids: dict[str, Any] = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        ids[name] = file.header.get(key)
        if ids[name] is not None and not 0 <= ids[name] < num_rows:
            file.refuse(key, f"must be below {num_rows}, the size of the vocabulary")
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom")))
    known = [token for token in ends if token is not None]
    return {
        "vocab_size": num_rows,
        "bos_token_id": ids["bos"],
        "eos_token_id": known[0] if len(known) == 1 else known or None,
        "pad_token_id": ids["padding"],
    }


def _positions(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the rotary positions: the size of a head, the base, and the scaling."""
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = _same_for_all_layers(file, "attention.key_length") or hidden // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if (_same_for_all_layers(file, key) or head_dim) != head_dim:
            file.refuse_own(key, f"must be {head_dim}, the size of a head")
    theta = float(file.own("rope.freq_base", ROPE_THETA))
    scaling = _scaling(file, fields["max_position_embeddings"])
    if ROPE_FACTORS in file.tensors:
        if scaling:
            file.refuse_own("rope.scaling.type", f"must be none beside the tensor {ROPE_FACTORS}")
        scaling = _llama3_scaling(file, theta, head_dim)
    return {
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling,
    }


def _scaling(file: GgufFile, context: int) -> dict[str, Any]:
    """Translate `rope.scaling.*` to transformers' `rope_parameters`; {} if nothing is scaled."""
    factor = file.own("rope.scaling.factor") or file.own("rope.scale_linear")
    kind = file.own("rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear", "yarn"):
        file.refuse_own("rope.scaling.type", "must be one of none, linear, yarn")
    extent = file.own("rope.scaling.yarn_ext_factor", -1.0)  # -1: as the type says
    if extent not in ((1.0, -1.0) if kind == "yarn" else (0.0, -1.0)):
        file.refuse_own("rope.scaling.yarn_ext_factor", f"must be {float(kind == 'yarn')} here")
    if kind == "linear" and factor and factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        return {}
    if not factor:
        file.refuse_own("rope.scaling.factor", "must be there for yarn")
    original = file.own("rope.scaling.original_context_length", context)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": file.own("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.own("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the `llama3` parameters that gave a file's factors of frequencies, or refuse the file.

    The converter writes factors, not parameters (`LlamaModel.generate_extra_tensors`). The largest
    factor is the scaling factor. The published models differ only in this and in the original
    context, so each context that may have given the factors is tried.
    """
    factors = torch.from_numpy(file.values(ROPE_FACTORS)).double()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents  # [head_dim / 2]
    largest, span = float(factors.max()), HIGH_FREQUENCY - LOW_FREQUENCY
    if len(factors) == len(frequencies):
        inverse = 1 / factors
        smooth = (inverse - inverse.min()) / (1 - inverse.min())
        contexts = (LOW_FREQUENCY + smooth * span) * 2 * math.pi / frequencies
        # A factor of 1, or one equal to the largest, tells nothing of the context.
        between = (factors > 1 + ROUNDING) & (factors < largest * (1 - ROUNDING))
        for context in (LLAMA3_CONTEXT, *contexts[between].round().long().tolist()):
            turns = context * frequencies / (2 * math.pi)  # in the original context
            smooth = ((turns - LOW_FREQUENCY) / span).clamp(0.0, 1.0)
            made = 1 / ((1 - smooth) / largest + smooth)  # by which each frequency is divided
            if torch.allclose(made, factors, rtol=ROUNDING, atol=0.0):
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "original_max_position_embeddings": context,
                    "low_freq_factor": LOW_FREQUENCY,
                    "high_freq_factor": HIGH_FREQUENCY,
                }
    file.refuse_file(
        "stretches positions otherwise than llama3 with low_freq_factor 1 and high_freq_factor 4",
        [ROPE_FACTORS],
    )


def gguf_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a GGUF file's model in `dtype`; see `gguf_config` and `_state` for errors."""
    file = open_gguf(path)
    config = gguf_config(file)
    with torch.device("meta"):
        outline: Any = AutoModelForCausalLM.from_config(config)
    model, report = type(outline).from_pretrained(
        None,
        config=config,
        state_dict=_state(file, outline, dtype),
        dtype=dtype,
        output_loading_info=True,
    )
    assert not any(report.values()), report  # `_state` has compared names and shapes
    return model


def _state(file: GgufFile, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert a file's tensors to `dtype`, under the names of `model`, the outline.

    A file that lacks a tensor, or has one without a place or of another shape, is refused.
    """
    architecture = ARCHITECTURES[file.architecture]
    names = _names(file, model)
    applied = {ROPE_FACTORS} if architecture.has_rope else set()
    if homeless := sorted(set(file.tensors) - applied - set(names)):
        file.refuse_file("has tensors without a place in the model", homeless)
    if missing := sorted(set(names) - set(file.tensors)):
        file.refuse_file("lacks tensors that the model needs", missing)
    expected = model.state_dict()
    state = {}
    for ours, theirs in names.items():
        values = torch.from_numpy(file.values(ours))
        owner = type(model.get_submodule(theirs.rpartition(".")[0])).__name__
        if owner == "Conv1D" and theirs.endswith(".weight"):
            values = values.T
        if architecture.interleaves and (heads := _heads(model.config, theirs)):
            values = _undo_interleaving(values, heads)
        if values.shape != expected[theirs].shape:
            shapes = f"{tuple(values.shape)}, not {tuple(expected[theirs].shape)}"
            file.refuse_file("has tensors of another shape", [f"{ours} {shapes}"])
        state[theirs] = values.to(dtype).contiguous()
    return state


def tensors_of(file: GgufFile, model: PreTrainedModel) -> Callable[[str], tuple[Any, Tensor]]:
    """Make a function that finds a linear layer's tensor in a file, by its name in the model.

    It also returns, for each row of the layer, the number of the tensor's row.
    """
    by_name = {theirs: ours for ours, theirs in _names(file, model).items()}

    def find(layer: str) -> tuple[Any, Tensor]:
        theirs = f"{layer}.weight"
        tensor = file.tensors[by_name.get(theirs, EMBEDDING)]  # a tied head has no name
        rows = torch.arange(int(tensor.shape[-1]))
        heads = _heads(model.config, theirs)
        if ARCHITECTURES[file.architecture].interleaves and heads:
            rows = _undo_interleaving(rows[:, None], heads)[:, 0]
        return tensor, rows

    return find


def _names(file: GgufFile, model: PreTrainedModel) -> dict[str, str]:
    """Map the file's tensor names to the model's names of the same tensors."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[file.architecture], model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    stems = [theirs.rpartition(".") for theirs in model.state_dict() if theirs not in tied]
    return {f"{table.get_name(stem)}.{suffix}": f"{stem}.{suffix}" for stem, _, suffix in stems}


def _heads(config: Any, name: str) -> int:
    """Count the heads of a tensor of queries or keys; 0 for other tensors."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def _undo_interleaving(values: Tensor, heads: int) -> Tensor:
    """Put a head's rows back from pairs into halves; see `LlamaModel.permute` of the converter."""
    pairs = values.view(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
