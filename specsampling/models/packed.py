"""Linear layers for the CPU: weights packed once for its bfloat16 kernels, or kept in 8 bit.

With weights packed into oneDNN's own layout at loading, linear layers of one to eight rows ran
1.3 to 2.4 times as fast as `torch.nn.functional.linear` on two AMD EPYC cores, and eight rows cost
about what one costs: both decoders gain. Which numbers are multiplied does not change; the order
in which they are summed may. Decoding waits for weights to be read, so 8 bit takes half of that
time. Rounding a draft costs some acceptance, and its target nothing; a rounded target is another
model, a little worse.

Knows nothing of decoding. Other devices and precisions keep their own layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

INT8_MAX = 127
TINY = 1e-12  # scale of rows that are zero
BLOCK = 8192  # rows of a weight
ZERO_POINT = 128  # of unsigned inputs
TRIAL_SIZE = 1024  # of the layer with which kernels are tried
TOO_SLOW = 4  # times float32
NUM_ROWS = 4  # random ones, on which a layer is held against its own
ROUNDING = 1e-3  # of a product in float32


class PackedLinear(nn.Module):
    """A linear layer for inference whose weight lies in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear, num_rows: int):
        """Pack a bfloat16 layer for calls of about `num_rows` rows (any number works)."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Not a parameter: an opaque layout can be neither saved nor moved.
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, num_rows)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return torch.ops.mkldnn._linear_pointwise.default(
            rows, self.packed_weight, self.bias, "none", [], ""
        )


def can_pack(model: nn.Module) -> bool:
    """Whether this machine has the kernels and the model is in plain bfloat16 on the CPU."""
    parameters = list(model.parameters())
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in parameters)
    )


def pack_linears(model: nn.Module, num_rows: int = 8) -> None:
    """Replace every `nn.Linear` of a model in place; its weights are let go of as it goes."""
    _replace_linears(model, lambda linear: PackedLinear(linear, num_rows))


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else: no adapter, no hook, no other forward.

    What is wrapped around a layer would be lost with it.
    """
    return type(module) is nn.Linear and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether more than a module's own class says what it computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    # By name: a list of the modules would keep all of the replaced ones' weights to the end.
    for name in [name for name, child in model.named_modules() if is_plain(child)]:
        model.set_submodule(name, make(model.get_submodule(name)))  # type: ignore[arg-type]
    for parameter in model.parameters():
        # A view of the checkpoint's file, it would keep all of the file in memory.
        parameter.data = parameter.data.clone()


@dataclass(frozen=True)
class Int8Kernel:
    """How this processor multiplies 8-bit numbers.

    Attributes:
        is_signed: whether inputs are given as signed; else they are shifted by ZERO_POINT.
        largest_weight: 127, or 63 where sums of two products overflow 16 bit (before VNNI).
    """

    is_signed: bool
    largest_weight: int = INT8_MAX

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] int8 in oneDNN's own layout."""
        return torch.ops.onednn.qlinear_prepack(weight, None)

    def multiply(
        self, inputs: Tensor, packed_weight: Tensor, scales: Tensor, zero_points: Tensor
    ) -> Tensor:
        """[rows, in] whole numbers of at most 127, times a packed weight and its scales, [out].

        Returns:
            [rows, out] float32: sums of integers, then scaled; the same bits signed or unsigned.
        """
        if self.is_signed:
            inputs, zero_point = inputs.to(torch.int8), 0
        else:
            inputs, zero_point = (inputs + ZERO_POINT).to(torch.uint8), ZERO_POINT
        return torch.ops.onednn.qlinear_pointwise.default(
            *(inputs, 1.0, zero_point),
            *(packed_weight, scales, zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )


@cache
def int8_kernel() -> Int8Kernel | None:
    """The faster way on this processor, found by trying; None where none is fast.

    oneDNN has fast kernels for signed inputs where there is AMX, for unsigned ones with AVX2 and
    AVX-512 too; for what it has none, it takes hundreds of times as long.
    """
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    ):
        return None
    seconds: dict[Int8Kernel, float] = {}
    for kernel in map(Int8Kernel, (True, False)):
        with suppress(RuntimeError):  # another kind of processor may have neither
            seconds[kernel] = _seconds(_trial(kernel))
    if not seconds:
        return None
    kernel = min(seconds, key=lambda kernel: seconds[kernel])
    rows, weight = torch.ones(1, TRIAL_SIZE), torch.ones(TRIAL_SIZE, TRIAL_SIZE)
    if seconds[kernel] > TOO_SLOW * _seconds(lambda: nn.functional.linear(rows, weight)):
        return None
    is_exact = bool((_trial(kernel)() == TRIAL_SIZE * INT8_MAX**2).all())
    return kernel if is_exact else replace(kernel, largest_weight=INT8_MAX // 2)


def _trial(kernel: Int8Kernel) -> Callable[[], Tensor]:
    """A multiplication of the largest numbers."""
    weight = torch.full((TRIAL_SIZE, TRIAL_SIZE), INT8_MAX, dtype=torch.int8)
    scales, zero_points = torch.ones(TRIAL_SIZE), torch.zeros(TRIAL_SIZE, dtype=torch.int32)
    inputs, packed_weight = torch.full((1, TRIAL_SIZE), float(INT8_MAX)), kernel.pack(weight)
    return lambda: kernel.multiply(inputs, packed_weight, scales, zero_points)


def _seconds(call: Callable[[], Tensor]) -> float:
    """Of the fastest of a few calls, the first not counted.

    On one thread: several wait for one another on a busy machine, longer than a call takes.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
        found = []
        for _ in range(10):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return min(found)


class Int8Linear(nn.Module):
    """A linear layer for inference in 8 bit: weights for good, inputs while it runs.

    Weights have a scale per output, inputs one per *row*. The products' sums are those of
    integers, which do not round: a row's bits are the same whatever else is in the call.
    """

    def __init__(self, linear: nn.Linear, kernel: Int8Kernel):
        super().__init__()
        self.kernel = kernel
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.data
        largest = kernel.largest_weight
        # A head in float32 is a gigabyte, so it is rounded block by block.
        parts = []
        for rows in weight.split(BLOCK):
            numbers, scales = quantized(rows, largest)
            parts.append((numbers.to(torch.int8), scales))
        self.scales = torch.cat([scales[:, 0] for _, scales in parts])  # [out]
        # Plain attributes: an opaque layout can be neither saved nor moved.
        self.packed_weight = kernel.pack(torch.cat([numbers for numbers, _ in parts]))
        self.zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.data.float()

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of `rows`."""
        inputs, scale = quantized(rows.reshape(-1, self.in_features).float())
        outputs = scale * self.kernel.multiply(
            inputs, self.packed_weight, self.scales, self.zero_points
        )
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.to(rows.dtype).view(*rows.shape[:-1], self.out_features)


def quantized(values: Tensor, largest: int = INT8_MAX) -> tuple[Tensor, Tensor]:
    """Whole numbers up to `largest`, [rows, n], and a scale per row, [rows, 1], in float32."""
    scales = values.abs().amax(dim=-1, keepdim=True).float().clamp(min=TINY) / largest
    return (values.float() / scales).round(), scales


def checked_int8(linear: nn.Linear, kernel: Int8Kernel) -> Int8Linear:
    """A layer in 8 bit, held against a product of the same rounded numbers in float32.

    Raises:
        ValueError: they differ by more than float32 rounds.
    """
    made = Int8Linear(linear, kernel)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(NUM_ROWS, linear.in_features, generator=generator)
    whole, row_scales = quantized(rows)
    parts = []
    for weight in linear.weight.data.split(BLOCK):
        numbers, scales = quantized(weight, kernel.largest_weight)
        parts.append(row_scales * (whole @ numbers.T) * scales.T)
    expected = torch.cat(parts, dim=1)
    if linear.bias is not None:
        expected += linear.bias.data.float()
    error = float((made(rows) - expected).norm() / expected.norm())
    if not error < ROUNDING:
        raise ValueError(f"a layer in 8 bit gives other values, off by {error:.1%}")
    return made


def can_int8() -> bool:
    """Whether this processor has fast kernels."""
    return int8_kernel() is not None


def to_int8(module: nn.Module) -> None:
    """Put all `nn.Linear`s of a module on the CPU into int8, in place, and the rest into float32.

    Embeddings stay as they are: they are only looked up, and the size of a small model.
    """
    kernel = int8_kernel()
    assert kernel, "ask can_int8 first"
    _replace_linears(module, lambda linear: checked_int8(linear, kernel))
    for child in module.modules():
        if not isinstance(child, nn.Embedding):
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.float()
