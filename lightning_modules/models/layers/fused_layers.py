"""Faster layers: transformers' modules with another forward pass and the same state.

A module's class becomes a subclass of its old class. The kernels are for a GPU. If they are not faster, such as in
float32 on a CPU, transformers' forward pass is used.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.architectures.registry import architecture_of
from lightning_modules.models.layers.onednn_linear import fast_linear

HALF = (torch.bfloat16, torch.float16)


@functools.cache
def is_recent_gpu(device: torch.device) -> bool:
    """Whether the device supports flash attention and Triton's matrix products: NVIDIA's Ampere (2020) or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the device supports this project's Triton kernels."""
    return is_recent_gpu(device) and importlib.util.find_spec("triton") is not None


class FusedNorm(nn.Module):
    """An RMS norm as one kernel without a gradient for the weight; a trained norm uses the original forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not has_kernels(x.device) or (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        from lightning_modules.models.layers.triton_norm_mlp import rms_norm

        return rms_norm(x, self.weight, self.variance_epsilon)


class FusedMLP(nn.Module):
    """A SwiGLU MLP with SiLU and gate as one kernel between its matrix products.

    In half precision, an inner width that is not a multiple of 8 is padded with zeros. Qwen2.5-VL's vision tower has
    3,420 inner units. Rows of 3,420 numbers are not aligned in memory, which makes a GPU's matrix products four times
    slower. The weights themselves do not change: each forward pass makes padded copies. If the tower is trained,
    autograd keeps the copies for the backward pass (26 MB a layer).
    """

    linear_names: tuple[str, str, str]  # names of gate, up and down

    def forward(self, x: Tensor) -> Tensor:
        linears = [getattr(self, name) for name in self.linear_names]
        gate, up, down = linears
        # PEFT's LoRA layers are not nn.Linear; padding would ignore their adapter.
        is_plain = all(isinstance(linear, nn.Linear) for linear in linears)
        missing = -down.in_features % 8 if is_plain and x.dtype in HALF else 0
        if missing:
            gated = silu_gated(*(_wider(linear, x, missing) for linear in (gate, up)))
            return F.linear(gated, F.pad(down.weight, (0, missing)), down.bias)
        if has_kernels(x.device):
            return down(silu_gated(gate(x), up(x)))
        return super().forward(x)


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, both [..., width]: the gate of SwiGLU (Shazeer 2020)."""
    if not has_kernels(gate.device):
        return F.silu(gate) * up
    from lightning_modules.models.layers.triton_norm_mlp import silu_gate

    return silu_gate(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)


def _wider(linear: nn.Linear, x: Tensor, missing: int) -> Tensor:
    bias = None if linear.bias is None else F.pad(linear.bias, (0, missing))
    return F.linear(x, F.pad(linear.weight, (0, 0, 0, missing)), bias)


class LinearPatchEmbedding(nn.Module):
    """The patch embedding as one matrix product.

    The stride of its convolution equals the kernel size, so each patch is multiplied by the weights once. On a CPU, the
    matrix product is four times as fast as the convolution.
    """

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return fast_linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight)


def with_fused_layers(model: nn.Module) -> nn.Module:
    """Change the model in place: RMS norms become `FusedNorm`, SwiGLU MLPs `FusedMLP`, patch embeddings
    `LinearPatchEmbedding`. All keep their state.
    """
    found = architecture_of(model).speed_ups(model)
    for module in found.norms:
        module.__class__ = _subclass(FusedNorm, type(module))
    for module in found.gated_mlps:
        module.__class__ = _subclass(FusedMLP, type(module), linear_names=found.gated_mlp_names)
    for module in found.patch_embeddings:
        module.__class__ = _subclass(LinearPatchEmbedding, type(module))
    return model


@functools.cache
def _subclass(kind: type[nn.Module], of: type[nn.Module], **attributes: Any) -> type[nn.Module]:
    return type(f"{kind.__name__}{of.__name__}", (kind, of), attributes)
