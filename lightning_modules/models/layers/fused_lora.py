"""A linear layer with LoRA as one differentiable operation: no pass over the full output beside the matrix products.

PEFT computes W x + s · B (A x) as two full outputs, a product with s and a sum, and autograd adds two full gradients of
x. Here s goes to the narrow side (A x has `rank` columns), and both sums are the accumulation of a matrix product. On
narrow models on a CPU those passes cost as much as the products themselves; on a GPU each is a kernel less.

In float32 on a CPU, where there are more tokens than outputs, W + s · B A is made first: one product in place of three,
and one backward for the gradient of x. In half precision that sum would be rounded.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_modules.models.layers.onednn_linear import multiply, uses_onednn


class FusedLoraLinear(LoraLinear):
    """PEFT's layer with a faster forward; everything else, and every case but the plain one, is PEFT's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.get_base_layer()
        has_dropout = not isinstance(self.lora_dropout[name], nn.Identity)
        if has_dropout or self.lora_bias[name] or any(p.requires_grad for p in base.parameters()):
            return super().forward(x)
        # What autocast would make of these operands; inside the operation it must find nothing left to cast.
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        bias = None if base.bias is None else base.bias.to(dtype)
        operands = (x.to(dtype), base.weight.to(dtype), bias, down.to(dtype), up.to(dtype))
        return _LoraProduct.apply(*operands, self.scaling[name])


class _LoraProduct(torch.autograd.Function):
    """x [..., I] -> W x + bias + s · B (A x) [..., O], with W [O, I] frozen, A [r, I], B [O, r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        ctx.is_merged = uses_onednn(flat, weight) and len(flat) > len(weight)
        if ctx.is_merged:
            narrow, weight = None, torch.addmm(weight, up, down, alpha=scaling)
            out = multiply(flat, weight, bias)
        else:
            narrow = (flat @ down.t()).mul_(scaling)  # [N, r]
            out = F.linear(flat, weight, bias).addmm_(narrow, up.t())
        ctx.save_for_backward(flat, weight, down, up, narrow)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, narrow = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_narrow = multiply(grad, up.t()).mul_(ctx.scaling)  # [N, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(grad, weight.t())
            grad_x = (grad_x if ctx.is_merged else grad_x.addmm_(grad_narrow, down)).view(ctx.shape)
        if ctx.is_merged:
            narrow = multiply(flat, down).mul_(ctx.scaling)
        grad_up = multiply(narrow.t(), grad.t()).t()  # the narrow one in front: a third faster than the other way
        return grad_x, None, None, multiply(grad_narrow.t(), flat.t()), grad_up, None
