"""Estimates a pair's memory from its configurations alone, before anything is loaded.

The estimate counts the weights in the precision asked for, both caches at the lengths to come, the
intermediate results of the largest call, and on a CPU the peak of loading. The process itself and
a GPU driver's context are not counted, because free memory is measured beside them.

This module knows nothing of texts: lengths come as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specsampling.models.distilled import is_distilled
from specsampling.models.kernel_model import why_no_kernel
from specsampling.models.memory import gigabytes
from specsampling.models.packing import why_not
from specsampling.models.source import quiet_transformers

WORKSPACE_BYTES = 200_000_000  # what CUDA's libraries take at their first calls
FLOAT = 4
SHOWN = 50_000_000  # bytes; fewer would be shown as 0.0 GB


@dataclass(frozen=True)
class Lengths:
    """The sizes of a run's texts and calls, in tokens."""

    longest: int  # prompt and answer
    prompt: int
    width: int  # rows of a target call
    num_texts: int = 1


@dataclass(frozen=True)
class Need:
    """The memory that a pair takes, in bytes."""

    weights: int
    caches: int  # those of all texts that are decoded at once
    calls: int  # the intermediate results of the largest call
    loading: int = 0  # the peak while weights are read and converted
    mapped: int = 0  # pages of files at that peak, which the system can drop and read again

    @property
    def decoding(self) -> int:
        return self.weights + self.caches + self.calls

    @property
    def total(self) -> int:
        """The peak of the memory."""
        return max(self.loading, self.decoding)

    @property
    def least(self) -> int:
        """The memory with which the pair runs, even if loading is slow."""
        return max(self.loading - self.mapped, self.decoding)

    def __str__(self) -> str:
        names = ("weights", "caches", "calls", "while loading")
        sizes = zip(names, (self.weights, self.caches, self.calls, self.loading))
        parts = [f"{name} {gigabytes(size)}" for name, size in sizes if size > SHOWN]
        return f"{gigabytes(self.total)} ({', '.join(parts) or 'all of it small'})"


@dataclass(frozen=True)
class Planned:
    """A model to be loaded."""

    outline: PreTrainedModel  # see `outline`; in the dtype to come
    quantization: str  # as `load_model` takes it
    is_mapped: bool = True  # whether its checkpoint is safetensors, mapped while it is loaded


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model's modules and shapes, without weights."""
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def need_of(
    target: Planned, drafts: Sequence[Planned], device: torch.device, lengths: Lengths
) -> Need:
    """Estimate what a target and its draft models take. One of the drafts is used at a time."""
    models = [target, *drafts]
    weights = [_weights(model, device) for model in models]
    caches = [cache_bytes(model.outline, lengths) for model in models]
    calls = [call_bytes(model.outline, lengths, _number_bytes(model, device)) for model in models]
    need = Need(
        weights=sum(weights),
        caches=caches[0] + max(caches[1:], default=0),
        calls=max(calls) + (WORKSPACE_BYTES if device.type == "cuda" else 0),
    )
    if device.type != "cpu":
        return need
    read = [_read_bytes(model.outline) for model in models]
    loading, mapped = max(  # the models so far, and the last one's checkpoint
        (sum(weights[: i + 1]) + read[i], model.is_mapped * read[i])
        for i, model in enumerate(models)
    )
    return replace(need, loading=loading, mapped=mapped)


def ways_out(
    target: Planned, drafts: Sequence[Planned], device: torch.device, lengths: Lengths, free: int
) -> list[str]:
    """List settings with which the same target would fit, and the memory that each takes."""
    quantizations = ("int8", "int4") if device.type == "cpu" else ("int8", "nf4")
    tried = [
        (f"models.target_quantization={name}", replace(target, quantization=name), drafts, lengths)
        for name in quantizations
        if target.quantization not in (name, "nf4")
    ]
    if drafts:
        tried.append(("models.draft=ngram", target, [], lengths))
    if lengths.num_texts > 1:
        tried.append(("run.batch_size=1", target, drafts, replace(lengths, num_texts=1)))
    shorter = replace(lengths, longest=lengths.prompt + (lengths.longest - lengths.prompt) // 2)
    tried.append(("half of decoding.max_new_tokens", target, drafts, shorter))
    needs = [(name, need_of(model, others, device, sizes)) for name, model, others, sizes in tried]
    return [f"{name} ({gigabytes(need.total)})" for name, need in needs if need.least <= free]


def _weights(model: Planned, device: torch.device) -> int:
    quantization = model.quantization
    is_plain = is_distilled(model.outline) and quantization == "none"
    if is_plain and uses_kernel(model.outline, "int8", device):
        quantization = "int8"  # it is shipped so
    return weight_bytes(model.outline, quantization, device)


def uses_kernel(model: PreTrainedModel, quantization: str, device: torch.device) -> bool:
    """Say whether the CPU kernel, whose calls are float32, will decode a model."""
    is_known = device.type == "cpu" and quantization != "nf4" and not why_not(model)
    return is_known and not why_no_kernel()


def _number_bytes(model: Planned, device: torch.device) -> int:
    """Return the bytes of a number in a model's calls."""
    is_float = uses_kernel(model.outline, model.quantization, device)
    return FLOAT if is_float else model.outline.dtype.itemsize


def _read_bytes(model: PreTrainedModel) -> int:
    """Count the bytes read of a checkpoint: all but an embedding that is not the head too."""
    weights = set(model.parameters())
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # a trimmed one has rows of its own
    if embedding.weight is not getattr(head, "weight", None):
        weights.discard(embedding.weight)
    return sum(weight.numel() * weight.element_size() for weight in weights)


def weight_bytes(model: PreTrainedModel, quantization: str, device: torch.device) -> int:
    """Count the bytes of a model's weights once they are loaded."""
    head = model.get_output_embeddings()
    packs = uses_kernel(model, quantization, device)
    total, seen = 0, set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, nn.Linear) and name == "weight"
            # A packed matrix is a copy, so a head that is tied to the embedding is there twice.
            if id(weight) in seen and not (is_matrix and packs):
                continue
            seen.add(id(weight))
            size = weight.numel()
            if not is_matrix:
                is_float = packs and not isinstance(module, nn.Embedding)
                total += size * (FLOAT if is_float else model.dtype.itemsize)
            elif quantization == "none" or (module is head and not packs):
                total += size * model.dtype.itemsize
            elif quantization == "int8" or module is head:
                total += size + FLOAT * weight.shape[0]
            else:  # 4 bit: 32 weights share a float16, or 64 of them a float32
                total += size * 9 // 16
    return total


def cache_bytes(model: PreTrainedModel, lengths: Lengths) -> int:
    """Count the bytes of all keys and values over the whole capacity of all texts."""
    num_heads = _size(model, "num_attention_heads", 1)
    head_dim = _size(model, "head_dim", _hidden_size(model) // num_heads)
    num_keys = _size(model, "num_key_value_heads", num_heads)
    capacity = -(-(lengths.longest + lengths.width) // 64) * 64
    per_token = 2 * _size(model, "num_hidden_layers", 1) * num_keys * head_dim
    return lengths.num_texts * capacity * per_token * model.dtype.itemsize


def call_bytes(model: PreTrainedModel, lengths: Lengths, number_bytes: int) -> int:
    """Count the bytes of the larger call: a prompt in one layer, or a decode call with logits.

    A number in the layers takes `number_bytes`.
    """
    hidden = _hidden_size(model)
    inner = _size(model, "intermediate_size", 4 * hidden)
    head: Any = model.get_output_embeddings()
    # The residual, its norm, queries, keys and values; gate, up and their product.
    per_row = (6 * hidden + 3 * inner) * number_bytes
    masks = 2 * lengths.prompt**2 * number_bytes if model.config.model_type == "gpt_neo" else 0
    prefill = lengths.prompt * per_row + masks
    rows = lengths.width * lengths.num_texts
    # Logits, and the float32 distributions of target and draft that a verdict needs.
    decode = rows * (per_row + head.out_features * (number_bytes + 5 * FLOAT))
    return max(prefill, decode)


def _size(model: PreTrainedModel, name: str, default: int) -> int:
    """Read a number of the configuration, or take `default` if it has none."""
    config: Any = model.config.get_text_config(decoder=True)
    # If layers differ, transformers refuses the attribute, but not the dictionary's entry.
    value = config.to_dict().get(config.attribute_map.get(name, name))
    return value if isinstance(value, int) else default


def _hidden_size(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return _size(model, "hidden_size", embedding.weight.shape[1])
