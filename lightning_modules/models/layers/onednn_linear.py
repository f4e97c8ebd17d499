"""Products of linear layers. In float32 on a CPU oneDNN makes them: PyTorch's own choice there is MKL, which leaves
half of an AMD core's vector width unused. Both sum in float32, in another order; everything else is PyTorch's own.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# How many plans of products oneDNN, and PyTorch in front of it, keep; read when the first is made. With 1,024 of each,
# their default, and rows of ever new lengths a process grows by 1.2 GB; a plan is made in less than a millisecond.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

# Not in every build of PyTorch, and not among its documented functions.
_ONEDNN = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


def uses_onednn(*tensors: Tensor) -> bool:
    """Whether products of these operands are oneDNN's."""
    known = _ONEDNN is not None and torch.backends.mkldnn.enabled
    return known and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, I] times weight [O, I] transposed, plus bias [O]: [N, O]. Without gradient; operands may be transposed."""
    if uses_onednn(x, weight):
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()  # with gaps in its memory oneDNN takes a plain loop, a thousand times slower
        return _ONEDNN.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class PackedProduct:
    """A linear layer without gradient for many products of few tokens: its weight [O, I] is laid out once for oneDNN.

    What follows a product is done by it while its output is at hand. It takes x [N, I] of the weight's type.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.by_onednn = uses_onednn(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.by_onednn else weight
        self.bias, self.out_features = bias, len(weight)

    def __call__(self, x: Tensor, activation: Literal["none", "swish"] = "none") -> Tensor:
        """[N, O], with the bias; with "swish" its SiLU."""
        if self.by_onednn:
            return _ONEDNN.default(x, self.weight, self.bias, activation, [], "")
        out = F.linear(x, self.weight, self.bias)
        return F.silu(out) if activation == "swish" else out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product, without bias, plus `other` [N, O]."""
        return self._with(x, other, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product, without bias, times `other` [N, O]."""
        return self._with(x, other, "mul")

    def _with(self, x: Tensor, other: Tensor, how: Literal["add", "mul"]) -> Tensor:
        if self.by_onednn:
            return _ONEDNN.binary(x, other, self.weight, None, how)
        out = F.linear(x, self.weight)
        return out + other if how == "add" else out * other


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` [..., O] by `multiply`, in both directions."""
    if not uses_onednn(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


class FastLinear(nn.Linear):
    """A linear layer by `fast_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


def with_fast_linears(model: nn.Module) -> nn.Module:
    """The same model: its plain linear layers become `FastLinear` and keep their state."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
    return model


class _Linear(torch.autograd.Function):
    """x [N, I] -> weight x + bias [N, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight.t()) if needs_x else None,
            multiply(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
