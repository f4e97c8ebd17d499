"""Linear layers with oneDNN for float32 on a CPU; otherwise PyTorch's own.

PyTorch would use MKL, which uses only half of the vector width of an AMD core. Both accumulate in float32, but in a
different order, so results differ by rounding.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN generates code for each shape of a matrix product and caches it; PyTorch has a second cache in front of that.
# Both hold 1,024 entries by default. With many different row lengths, a process grew by 1.2 GB, and generating an entry
# takes less than a millisecond. Both variables are read at the first matrix product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

# A private function of PyTorch, which is not in every build.
_ONEDNN = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


def uses_onednn(*tensors: Tensor) -> bool:
    """Whether oneDNN supports these operands."""
    known = _ONEDNN is not None and torch.backends.mkldnn.enabled
    return known and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradient: x [N, I], weight [O, I] and bias [O] -> [N, O]. Operands may be transposed views."""
    if uses_onednn(x, weight):
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            # For a weight with gaps in memory (a slice), oneDNN would use a plain loop, which is a thousand times
            # slower.
            weight = weight.contiguous()
        return _ONEDNN.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class PrepackedLinear:
    """A linear layer without gradient that is called often with few tokens.

    The weight [O, I] is converted to oneDNN's layout once. The following operation (SiLU, addition, multiplication) is
    fused into the matrix product (oneDNN's post-operations). x [N, I] must have the weight's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.by_onednn = uses_onednn(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.by_onednn else weight
        self.bias, self.out_features = bias, len(weight)

    def __call__(self, x: Tensor, activation: Literal["none", "swish"] = "none") -> Tensor:
        """x W^T + bias [N, O]; with "swish" (oneDNN's name for SiLU) SiLU of that."""
        if self.by_onednn:
            return _ONEDNN.default(x, self.weight, self.bias, activation, [], "")
        out = F.linear(x, self.weight, self.bias)
        return F.silu(out) if activation == "swish" else out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """x W^T + other [N, O], without the bias."""
        return self._with(x, other, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T) * other [N, O], elementwise, without the bias."""
        return self._with(x, other, "mul")

    def _with(self, x: Tensor, other: Tensor, how: Literal["add", "mul"]) -> Tensor:
        if self.by_onednn:
            return _ONEDNN.binary(x, other, self.weight, None, how)
        out = F.linear(x, self.weight)
        return out + other if how == "add" else out * other


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` [..., O], with oneDNN in the forward and the backward pass if it supports the operands."""
    # Under autocast the operands would be cast first, which F.linear does.
    if not uses_onednn(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


class FastLinear(nn.Linear):
    """`nn.Linear` that computes with `fast_linear`; the state is the same."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


def with_fast_linears(model: nn.Module) -> nn.Module:
    """Change the model in place: its plain `nn.Linear` modules become `FastLinear` and keep their state."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
    return model


class _Linear(torch.autograd.Function):
    """x [N, I] -> weight x + bias [N, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
