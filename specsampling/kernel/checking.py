"""Checks the conditions that the C files assume, before they are called.

This module knows nothing of models beyond their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN_FORMATS = ("float32", "float16", "bfloat16", "int8", "Q4_0")
# The numbers and the bytes of one block of a GGUF file.
BLOCKS = {
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}


def check_matrix(
    weight: Tensor, format: str, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> None:
    """Check a matrix of floats before it is packed.

    Raises:
        ValueError: the shape, the type, the format or an order cannot be packed.
    """
    if weight.dim() != 2 or weight.device.type != "cpu":
        raise ValueError(f"weights must be a matrix in main memory (got {_shape_of(weight)})")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weights must be float32, float16 or bfloat16 (got {weight.dtype})")
    if format not in PLAIN_FORMATS:
        raise ValueError(f"the format must be one of {', '.join(PLAIN_FORMATS)} (got {format})")
    _check_order("rows", rows, weight.shape[0])
    _check_order("columns", columns, weight.shape[1])
    _check_bias(bias, weight.shape[0])


def check_blocks(
    data: np.ndarray, format: str, num_inputs: int, bias: Tensor | None, rows: Tensor | None
) -> None:
    """Check a GGUF file's tensor, [outputs, bytes of a row], before it is packed.

    Raises:
        ValueError: a row has too few bytes or too many, or an order cannot be packed.
    """
    if format not in BLOCKS:
        raise ValueError(f"the format must be one of {', '.join(BLOCKS)} (got {format})")
    numbers, num_bytes = BLOCKS[format]
    if num_inputs <= 0 or num_inputs % numbers:
        raise ValueError(f"{format} needs a multiple of {numbers} inputs (got {num_inputs})")
    expected = num_inputs // numbers * num_bytes
    if data.ndim != 2 or data.dtype.itemsize * data.shape[1] != expected:
        raise ValueError(
            f"{num_inputs} inputs in {format} must have {expected} bytes a row"
            f" (got {data.dtype} of the shape {list(data.shape)})"
        )
    _check_order("rows", rows, data.shape[0])
    _check_bias(bias, data.shape[0])


def check_layers(layers: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> None:
    """Check that the linear parts of layers fit a model's sizes.

    Raises:
        ValueError: a part is missing, or has another shape.
    """
    hidden, inner = sizes["hidden_padded"], sizes["inner"]
    heads, key_heads = (sizes[name] * sizes["head_padded"] for name in ("heads", "key_heads"))
    narrow = -(-sizes["hidden"] // 16) * 16
    expected = {
        "query": (heads, hidden),
        "key": (key_heads, hidden),
        "value": (key_heads, hidden),
        "output": (narrow, heads),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (narrow, inner),
    }
    for i, linears in enumerate(layers):
        for name, shape in expected.items():
            if name == "gate" and name not in linears:
                continue
            if name not in linears:
                raise ValueError(f"layer {i} has no {name}")
            check_shape(f"layer {i}'s {name}", linears[name], *shape)


def check_head(head: Any, tokens: Tensor | None, sizes: Mapping[str, int]) -> None:
    """Check that the head scores the whole vocabulary, or exactly the named tokens.

    Raises:
        ValueError: the head has another shape, or a named token is not in the vocabulary.
    """
    rows, vocabulary = sizes["head_rows"], sizes["vocabulary"]
    check_shape("the head", head, -(-rows // 16) * 16, sizes["hidden_padded"])
    if tokens is None:
        if rows != vocabulary:
            raise ValueError(f"the head must score {vocabulary} tokens (got {rows})")
    elif len(tokens) != rows or tokens.dtype != torch.int32:
        raise ValueError(f"the head's tokens must be {rows} int32 (got {_shape_of(tokens)})")
    elif rows and (int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary):
        raise ValueError(f"the head's tokens must be ids from 0 to {vocabulary - 1}")


def check_shape(name: str, linear: Any, outputs: int, inputs: int) -> None:
    if (linear.outputs, linear.inputs) != (outputs, inputs):
        raise ValueError(
            f"{name} must be of the padded shape {outputs} x {inputs}"
            f" (got {linear.outputs} x {linear.inputs})"
        )


def check_tokens(ids: Sequence[int], start: int, capacity: int, vocabulary: int) -> np.ndarray:
    """Make an array, [n], of a request's token ids. The C files read only 32 bits of each id.

    Raises:
        ValueError: a token or a position is out of range.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    if start < 0 or start + len(tokens) > capacity:
        raise ValueError(
            f"a row's position is out of range: {start} to {start + len(tokens) - 1} of {capacity}"
        )
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(f"a row's token id is out of range: it must be below {vocabulary}")
    return tokens


def _check_order(name: str, order: Tensor | None, size: int) -> None:
    if order is None or not len(order):
        return
    if int(order.min()) < -1 or int(order.max()) >= size:
        raise ValueError(f"{name} must be from -1 to {size - 1}")


def _check_bias(bias: Tensor | None, outputs: int) -> None:
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"the bias must have {outputs} numbers (got {_shape_of(bias)})")


def _shape_of(tensor: Tensor) -> str:
    return f"{tensor.dtype} of the shape {list(tensor.shape)} on {tensor.device}"
