"""Faster layers: other forward passes of transformers' modules, with the same state.

A module's class becomes a subclass of what it was. Kernels are for a GPU: in float32 on a CPU, and wherever else
nothing is gained, it is transformers' own norms and MLPs that run.
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
    """Whether flash attention and Triton's matrix products run there: NVIDIA's Ampere, of 2020, or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels written in Triton run there."""
    return is_recent_gpu(device) and importlib.util.find_spec("triton") is not None


class FusedNorm(nn.Module):
    """An RMS norm as one kernel, but for a weight's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not has_kernels(x.device) or (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        from lightning_modules.models.layers.triton_norm_mlp import rms_norm

        return rms_norm(x, self.weight, self.variance_epsilon)


class FusedMLP(nn.Module):
    """A gated MLP with what lies between its products as one kernel.

    In half precision an inner width that is no multiple of 8 is filled up with zeros: Qwen2.5-VL's vision tower has
    3,420 inner units, and as rows of so many numbers start anywhere in memory, their products are four times slower on
    a GPU. The weights stay what they are; filled copies are made on the way (and kept for the gradient, 26 MB a layer,
    where the tower is trained).
    """

    linear_names: tuple[str, str, str]  # of gate, up and down

    def forward(self, x: Tensor) -> Tensor:
        linears = [getattr(self, name) for name in self.linear_names]
        gate, up, down = linears
        is_plain = all(isinstance(linear, nn.Linear) for linear in linears)  # without an adapter
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


class PatchProduct(nn.Module):
    """The patch embedding as one product: its convolution steps by the length of its kernel, so no two places overlap.
    On a CPU the product is four times as fast."""

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return fast_linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight)


def with_fused_layers(model: nn.Module) -> nn.Module:
    """The same model: its RMS norms become `FusedNorm`, its MLPs with SiLU `FusedMLP`; they keep their state."""
    found = architecture_of(model).speed_ups(model)
    for module in found.norms:
        module.__class__ = _subclass(FusedNorm, type(module))
    for module in found.gated_mlps:
        module.__class__ = _subclass(FusedMLP, type(module), linear_names=found.gated_mlp_names)
    for module in found.patch_embeddings:
        module.__class__ = _subclass(PatchProduct, type(module))
    return model


@functools.cache
def _subclass(kind: type[nn.Module], of: type[nn.Module], **attributes: Any) -> type[nn.Module]:
    return type(f"{kind.__name__}{of.__name__}", (kind, of), attributes)
