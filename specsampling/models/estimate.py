"""What a pair takes of memory, from its configurations alone, before anything is loaded.

Weights in the precision asked for, both caches at the lengths to come, and what the widest calls
make on their way. On a CPU the process itself comes on top, which is there already when this is
asked; on a GPU the driver's context.

Knows nothing of texts: lengths come as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specsampling.models.packed import can_int8
from specsampling.models.source import quiet_transformers

NF4_BLOCK = 64  # weights that share a float32
CONTEXT_BYTES = 500_000_000  # of the CUDA driver and its libraries' workspaces, per process
FLOAT = 4


@dataclass(frozen=True)
class Lengths:
    """Of a run's texts and calls, in tokens."""

    longest: int  # prompt and answer
    prompt: int
    width: int  # rows of a target call
    num_texts: int = 1


@dataclass(frozen=True)
class Need:
    """Bytes."""

    weights: int
    caches: int
    activations: int
    context: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.activations + self.context

    def __add__(self, other: Need) -> Need:
        """Of two models that take turns: what calls make is let go of before the other's."""
        return Need(
            self.weights + other.weights,
            self.caches + other.caches,
            max(self.activations, other.activations),
            max(self.context, other.context),
        )


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model's modules and shapes, without weights."""
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def need_of(
    model: PreTrainedModel, quantization: str, device: torch.device, lengths: Lengths
) -> Need:
    """What a model will take.

    Args:
        model: an `outline` in the dtype to come.
        quantization: as `load_model` takes it.
        device: where it will be.
        lengths: of the run to come.
    """
    computes_in = FLOAT if _is_cpu_int8(quantization, device) else model.dtype.itemsize
    return Need(
        weight_bytes(model, quantization, device),
        cache_bytes(model, lengths),
        activation_bytes(model, lengths, computes_in),
        CONTEXT_BYTES if device.type == "cuda" else 0,
    )


def _is_cpu_int8(quantization: str, device: torch.device) -> bool:
    return quantization == "int8" and device.type == "cpu" and can_int8()


def weight_bytes(model: PreTrainedModel, quantization: str, device: torch.device) -> int:
    """Of the weights once loaded; see `packed.py` for the CPU, bitsandbytes for int8 and nf4."""
    head = model.get_output_embeddings()
    packs = device.type == "cpu" and model.dtype == torch.bfloat16
    total, seen = 0, set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, nn.Linear) and name == "weight"
            # A packed matrix is a copy, so a head that is tied to the embedding is there twice.
            copies = is_matrix and (packs or _is_cpu_int8(quantization, device))
            if id(weight) in seen and not copies:
                continue
            seen.add(id(weight))
            size = weight.numel()
            if not is_matrix:
                is_float = _is_cpu_int8(quantization, device) and not isinstance(
                    module, nn.Embedding
                )
                total += size * (FLOAT if is_float else model.dtype.itemsize)
            elif _is_cpu_int8(quantization, device):
                total += size + 2 * FLOAT * weight.shape[0]
            elif quantization == "none" or module is head:
                total += size * model.dtype.itemsize
            elif quantization == "int8":
                total += size + FLOAT * weight.shape[0]
            else:
                total += size // 2 + size // NF4_BLOCK * FLOAT
    return total


def cache_bytes(model: PreTrainedModel, lengths: Lengths) -> int:
    """Of keys and values, over the whole capacity of each text."""
    config: Any = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_keys = getattr(config, "num_key_value_heads", None) or num_heads
    capacity = -(-(lengths.longest + lengths.width) // 64) * 64
    per_token = 2 * config.num_hidden_layers * num_keys * head_dim * model.dtype.itemsize
    return lengths.num_texts * capacity * per_token


def activation_bytes(model: PreTrainedModel, lengths: Lengths, computes_in: int) -> int:
    """Of the larger call: the prompt's through a layer, or a decode call with its logits."""
    config: Any = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    head: Any = model.get_output_embeddings()
    # The residual, its norm, queries, keys and values; gate, up and their product.
    per_row = (6 * config.hidden_size + 3 * inner) * computes_in
    masks = 2 * lengths.prompt**2 * computes_in if config.model_type == "gpt_neo" else 0
    prefill = lengths.prompt * per_row + masks
    rows = lengths.width * lengths.num_texts
    # Logits, and distributions of target and draft in float32 on their way to a verdict.
    decode = rows * (per_row + head.out_features * (computes_in + 5 * FLOAT))
    return max(prefill, decode)
