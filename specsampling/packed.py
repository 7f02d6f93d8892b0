"""Linear layers for the CPU: weights packed once for its bfloat16 kernels, or kept in 8 bit.

With weights packed into oneDNN's own layout at loading, linear layers of one to eight rows ran
1.3 to 2.4 times as fast as `torch.nn.functional.linear` on two AMD EPYC cores, and eight rows cost
about what one costs: both decoders gain. Which numbers are multiplied does not change; the order
in which they are summed may. A small draft waits for its weights to be read, so 8 bit halves its
time; rounding costs a draft some acceptance, and its target nothing.

Knows nothing of decoding. Other devices and precisions keep their own layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INT8_STEP = 32  # the widest vector's number of elements, in bfloat16


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
        return torch.ops.mkldnn._linear_pointwise(
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
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, num_rows))


class Int8Linear(nn.Module):
    """A linear layer for inference with weights in int8, a scale per output, inputs as they are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.data.float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # [out]
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        flat = rows.reshape(-1, self.in_features)
        product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
        product = product.view(*rows.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def to_int8(model: nn.Module) -> None:
    """Replace the `nn.Linear`s of a model on the CPU in place, its head included.

    Layers that the kernel cannot take stay: torch 2.13 reads past the end of rows whose length
    is not a multiple of a vector's.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features % INT8_STEP == 0:
                setattr(module, name, Int8Linear(child))
