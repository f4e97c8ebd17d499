"""The one entry to faster layers: `accelerate_layers`. Whoever builds a model needs to know no device."""

from __future__ import annotations

from torch import nn

from lightning_modules.models.layers.cpu_allocator import keep_freed_memory
from lightning_modules.models.layers.fused_layers import with_fused_layers
from lightning_modules.models.layers.onednn_linear import with_fast_linears


def accelerate_layers(model: nn.Module) -> nn.Module:
    """The same model with the same state, in place. Each layer takes its fast path where tensor and device allow it:
    Triton kernels on a recent GPU, oneDNN in float32 on a CPU."""
    keep_freed_memory()
    return with_fast_linears(with_fused_layers(model))
