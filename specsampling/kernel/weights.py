"""Packs linear layers in the order in which `step.c` multiplies them.

This module knows nothing of models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specsampling.kernel import checking

FORMATS = ("float32", "float16", "bfloat16", "int8", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "Q8_0": 8, "Q6_K": 8}  # others: 4
# Bytes of the scales of 16 outputs and 32 inputs, or 256 inputs in a K format.
SCALES = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 64, "Q4_K": 64, "Q6_K": 32}
PARTS = {"Q4_K": 32, "Q6_K": 32}  # bytes of the scales' parts for 16 outputs and 32 inputs
LANES, GROUP, SUPER = 16, 32, 256


class LinearStructure(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("numbers", "scales", "parts", "bias")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "format")),
    ]


def padded(size: int, step: int) -> int:
    """Round a size up to a multiple of `step`."""
    return -(-size // step) * step


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Packed:
    """A linear layer as `step.c` reads it.

    Attributes:
        outputs, inputs: the padded sizes.
        format: one of FORMATS.
        numbers, scales, parts, bias: the tensors that the layer's C structure points to.
    """

    outputs: int
    inputs: int
    format: str
    numbers: Tensor
    scales: Tensor
    parts: Tensor
    bias: Tensor | None

    def structure(self) -> LinearStructure:
        return LinearStructure(
            *(address(tensor) for tensor in (self.numbers, self.scales, self.parts, self.bias)),
            *(self.outputs, self.inputs, FORMATS.index(self.format)),
        )

    @property
    def num_bytes(self) -> int:
        tensors = (self.numbers, self.scales, self.parts)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Packer:
    """Brings weights into a layer's order, on several threads."""

    def __init__(self, library: ctypes.CDLL, num_threads: int):
        self._library = library
        self._num_threads = num_threads

    def plain(
        self,
        weight: Tensor,
        format: str,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Packed:
        """Pack a matrix of floats, [outputs, inputs], rounded to `format`.

        Args:
            weight: in float32, float16 or bfloat16.
            format: "float32", "float16", "bfloat16", "int8" or "Q4_0".
            bias: [outputs].
            rows: for each place the output that stands there, or -1 for zeros; None keeps the
                order.
            columns: the same for the inputs.

        Raises:
            ValueError: a weight is not finite or too large, or a shape is wrong.
        """
        checking.check_matrix(weight, format, bias, rows, columns)
        weight = weight.contiguous()
        rows = _order(rows, weight.shape[0], LANES)
        columns = _order(columns, weight.shape[1], GROUP)
        packed = _empty(len(rows), len(columns), format, bias, rows)
        number = FORMATS.index(format)

        def pack(start: int, end: int) -> int:
            scratch = torch.empty(packed.inputs)
            return self._library.pack_plain(
                *(number, weight.data_ptr(), PLAIN[weight.dtype], weight.shape[1]),
                *(rows.data_ptr(), columns.data_ptr(), packed.inputs, start, end),
                *(packed.numbers.data_ptr(), packed.scales.data_ptr(), scratch.data_ptr()),
            )

        if any(self._run(pack, packed.outputs)):
            raise ValueError(f"a weight is not finite, or too large for {format}")
        return packed

    def blocks(
        self,
        data: np.ndarray,
        format: str,
        num_inputs: int,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Packed:
        """Pack a GGUF file's tensor, [outputs, bytes of a row], without changing its numbers.

        Raises:
            ValueError: a shape is wrong.
        """
        checking.check_blocks(data, format, num_inputs, bias, rows)
        data = np.ascontiguousarray(data).view(np.uint8).reshape(data.shape[0], -1)
        rows = _order(rows, data.shape[0], LANES)
        packed = _empty(len(rows), num_inputs, format, bias, rows)
        number = FORMATS.index(format)

        def pack(start: int, end: int) -> int:
            self._library.pack_blocks(
                *(number, data.ctypes.data, data.shape[1], rows.data_ptr(), num_inputs),
                *(start, end, packed.numbers.data_ptr(), packed.scales.data_ptr()),
                packed.parts.data_ptr(),
            )
            return 0

        self._run(pack, packed.outputs)
        return packed

    def _run(self, pack: Callable[[int, int], int], outputs: int) -> list[int]:
        """Pack whole blocks of outputs on each thread, so that no two threads write to one byte."""
        step = padded(-(-outputs // (4 * self._num_threads)), LANES)
        starts = range(0, outputs, step)
        with ThreadPoolExecutor(self._num_threads) as threads:
            return list(threads.map(lambda at: pack(at, min(at + step, outputs)), starts))


def _order(chosen: Tensor | None, size: int, step: int) -> Tensor:
    chosen = torch.arange(size) if chosen is None else chosen
    missing = padded(len(chosen), step) - len(chosen)
    return torch.cat([chosen.int(), torch.full((missing,), -1, dtype=torch.int32)])


def _empty(outputs: int, inputs: int, format: str, bias: Tensor | None, rows: Tensor) -> Packed:
    bits = BITS.get(format, 4)
    per_scale = SUPER if format.endswith("_K") else GROUP
    num_scales = outputs // LANES * (inputs // per_scale) * SCALES.get(format, 0)
    if format == "int8":
        num_scales = 4 * outputs
    num_parts = outputs // LANES * (inputs // GROUP) * PARTS.get(format, 0)
    if bias is not None:
        chosen = bias.float()[rows.clamp(min=0).long()]
        bias = torch.where(rows >= 0, chosen, 0.0)
    numbers, scales, parts = (
        torch.zeros(size, dtype=torch.uint8)
        for size in (outputs * inputs * bits // 8, num_scales, num_parts)
    )
    return Packed(outputs, inputs, format, numbers, scales, parts, bias)
