"""RMS norm (Zhang and Sennrich 2019) and the gate of SwiGLU (Shazeer 2020) on a GPU, in Triton.

Forward and backward pass each read and write memory once. With PyTorch's operations they need eight and three passes
over the widest tensors of a layer, and autograd keeps copies in float32. Here, autograd keeps only the input and one
number per row.

Shapes: N rows with `width` numbers each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # number of elements of a row that one program of the gate computes


@triton.jit
def _norm(x, weight, out, scales, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    scaled = (values * scale).to(out.dtype.element_ty).to(tl.float32)  # rounded at the same point as in the model
    scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, scaled.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _norm_backward(grad, x, weight, scales, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(scales + row)
    scaled = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32) * scale
    of_scaled = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    of_scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(of_scaled * scaled, axis=0) / width
    tl.store(out + row * width + column, ((of_scaled - scaled * along) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate, up, out, width, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    activated = (x * tl.sigmoid(x)).to(out.dtype.element_ty).to(tl.float32)
    activated *= tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, activated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, of_gate, of_up, width, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    slope = share * (1 + x * (1 - share))
    tl.store(of_gate + row * width + column, (arriving * factor * slope).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + row * width + column, (arriving * x * share).to(of_up.dtype.element_ty), mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width, x = x.shape[-1], x.contiguous()
        out = torch.empty_like(x)
        scales = x.new_empty(x.numel() // width, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        _norm[(len(scales),)](x, weight, out, scales, width, eps, BLOCK=block, num_warps=_warps(block))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        width, grad, out = x.shape[-1], grad.contiguous(), torch.empty_like(x)
        block = triton.next_power_of_2(width)
        _norm_backward[(len(scales),)](grad, x, weight, scales, out, width, BLOCK=block, num_warps=_warps(block))
        return out, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        rows, width = gate.shape
        out = gate.new_empty(rows, width)
        _gated[(rows, triton.cdiv(width, BLOCK))](gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        rows, width = gate.shape
        of_gate, of_up = gate.new_empty(rows, width), up.new_empty(rows, width)
        strides = (gate.stride(0), up.stride(0))
        _gated_backward[(rows, triton.cdiv(width, BLOCK))](
            grad.contiguous(), gate, up, of_gate, of_up, width, *strides, BLOCK=BLOCK
        )
        return of_gate, of_up


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each row of `x` [..., width], multiplied by `weight` [width]; `weight` gets no gradient."""
    with torch.cuda.device_of(x):  # Triton uses the current device, not the device of the tensors
        return _Norm.apply(x, weight.detach(), eps)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, both [N, width]; the rows may be slices of wider rows."""
    with torch.cuda.device_of(gate):
        return _Gated.apply(gate, up)
