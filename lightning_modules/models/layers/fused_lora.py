"""A linear layer with LoRA as one differentiable operation, without elementwise passes over the full output.

PEFT computes W x + s · B (A x) as two outputs [N, O], a multiplication by s and a sum, and autograd adds two gradients
of x. Here s multiplies the narrow A x [N, r], and both sums are accumulated by a matrix product (addmm). For narrow
models on a CPU, PEFT's elementwise passes cost as much as the matrix products. On a GPU, each of them is one more
kernel.

In float32 on a CPU, if there are more tokens than outputs, W + s · B A is computed first: one matrix product instead of
three, also for the gradient of x. In half precision, this sum would be rounded.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_modules.models.layers.onednn_linear import linear, uses_onednn


class FusedLoraLinear(LoraLinear):
    """PEFT's layer with a faster forward pass for one plain adapter on a frozen layer; otherwise PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.get_base_layer()
        has_dropout = not isinstance(self.lora_dropout[name], nn.Identity)
        if has_dropout or self.lora_bias[name] or any(p.requires_grad for p in base.parameters()):
            return super().forward(x)
        # Cast as autocast would, because autocast has no effect inside a custom autograd function.
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        bias = None if base.bias is None else base.bias.to(dtype)
        operands = (x.to(dtype), base.weight.to(dtype), bias, down.to(dtype), up.to(dtype))
        return _LoraFunction.apply(*operands, self.scaling[name])


class _LoraFunction(torch.autograd.Function):
    """x [..., I] -> W x + bias + s · B (A x) [..., O], with W [O, I] frozen, A [r, I], B [O, r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        ctx.is_merged = uses_onednn(flat, weight) and len(flat) > len(weight)
        if ctx.is_merged:
            narrow, weight = None, torch.addmm(weight, up, down, alpha=scaling)
            out = linear(flat, weight, bias)
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
        grad_narrow = linear(grad, up.t()).mul_(ctx.scaling)  # [N, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.t())
            grad_x = (grad_x if ctx.is_merged else grad_x.addmm_(grad_narrow, down)).view(ctx.shape)
        if ctx.is_merged:
            narrow = linear(flat, down).mul_(ctx.scaling)
        grad_up = linear(narrow.t(), grad.t()).t()  # narrow operand first: a third faster than the other order
        return grad_x, None, None, linear(grad_narrow.t(), flat.t()), grad_up, None
