"""Faster layers of Qwen2.5-VL: other forward passes of transformers' modules, with the same state.

A module's class becomes a subclass of what it was. Kernels are for a GPU: in float32 on a CPU, and wherever else
nothing is gained, it is transformers' own norms and MLPs that run.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        down, linears = self.down_proj, (self.gate_proj, self.up_proj, self.down_proj)
        is_plain = all(isinstance(linear, nn.Linear) for linear in linears)  # without an adapter
        missing = -down.in_features % 8 if is_plain and x.dtype in HALF else 0
        if missing:
            gate, up = (_wider(linear, x, missing) for linear in (self.gate_proj, self.up_proj))
            return F.linear(self.activate(gate, up), F.pad(down.weight, (0, missing)), down.bias)
        if has_kernels(x.device):
            return down(self.activate(self.gate_proj(x), self.up_proj(x)))
        return super().forward(x)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """What `down_proj` is given."""
        if not has_kernels(gate.device):
            return self.act_fn(gate) * up
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
    """The same Qwen2.5-VL: its RMS norms become `FusedNorm`, its MLPs with SiLU `FusedMLP`; they keep their state."""
    text, visual = model.model.language_model, model.model.visual
    norms = [text.norm, *(n for layer in text.layers for n in (layer.input_layernorm, layer.post_attention_layernorm))]
    norms += [visual.merger.ln_q, *(n for block in visual.blocks for n in (block.norm1, block.norm2))]
    mlps = [layer.mlp for layer in text.layers] if model.config.text_config.hidden_act == "silu" else []
    mlps += [block.mlp for block in visual.blocks] if model.config.vision_config.hidden_act == "silu" else []
    for modules, kind in ((norms, FusedNorm), (mlps, FusedMLP), ([visual.patch_embed], PatchProduct)):
        for module in modules:
            module.__class__ = _subclass(kind, type(module))
    return model


@functools.cache
def _subclass(kind: type[nn.Module], of: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}{of.__name__}", (kind, of), {})
