"""Linear layers for the CPU: weights packed once for its bfloat16 kernels, or kept in 8 bit.

With weights packed into oneDNN's own layout at loading, linear layers of one to eight rows ran
1.3 to 2.4 times as fast as `torch.nn.functional.linear` on two AMD EPYC cores, and eight rows cost
about what one costs: both decoders gain. Which numbers are multiplied does not change; the order
in which they are summed may. A small draft waits for its weights to be read, so 8 bit halves its
time; rounding costs a draft some acceptance, and its target nothing.

Knows nothing of decoding. Other devices and precisions keep their own layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


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


def _replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    # By name: a list of the modules would keep all of the replaced ones' weights to the end.
    for name in [name for name, child in model.named_modules() if type(child) is nn.Linear]:
        model.set_submodule(name, make(model.get_submodule(name)))  # type: ignore[arg-type]
    for parameter in model.parameters():
        # A view of the checkpoint's file, it would keep all of the file in memory.
        parameter.data = parameter.data.clone()


class Int8Linear(nn.Module):
    """A linear layer for inference in 8 bit: weights for good, inputs while it runs.

    Weights have a scale per output, inputs one per call. In and out goes float32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.data
        largest = torch.linalg.vector_norm(weight, ord=torch.inf, dim=1)  # [out]
        scale = largest.float().clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # torch 2.13 announces the end of these types
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(
                weight.float(), scale.double(), zeros, 0, torch.qint8
            )
            bias = None if linear.bias is None else linear.bias.data.float()
            self.packed_weight = torch.ops.quantized.linear_prepack(quantized, bias)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], both float32."""
        # Without VNNI the kernel's sums of two products overflow 16 bit: inputs get 7 bit there.
        has_vnni = torch.cpu._is_vnni_supported()
        return torch.ops.quantized.linear_dynamic.default(rows, self.packed_weight, not has_vnni)


def can_int8() -> bool:
    """Whether this processor has the kernels."""
    return torch.backends.quantized.engine == "x86"


def to_int8(model: nn.Module) -> None:
    """Make a model on the CPU float32 with all its `nn.Linear`s in int8, in place."""
    _replace_linears(model, Int8Linear)
    model.float()
