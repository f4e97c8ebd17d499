"""Choose the fastest implementation of sampling model and frozen reference, by device, precision and family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_modules.models.inference.base import SamplingModel
from lightning_modules.models.inference.cpu_model import CpuSamplingModel
from lightning_modules.models.inference.gpu_model import GpuSamplingModel
from lightning_modules.models.inference.plain_model import PlainSamplingModel

if TYPE_CHECKING:
    from lightning_modules.models.qwen_vl import QwenVL


def fastest_sampling_model(policy: QwenVL, static: bool = False) -> SamplingModel:
    """The policy with its present weights, in the fastest supported implementation; otherwise transformers' own layers.

    LoRA is added to a copy of the linear weights.

    Args:
        policy: a sharded policy must be inside `gathered`.
        static: each step has all rows at fixed shapes, and the model is kept for later calls (`refresh`).
    """
    sharded = policy.sharded is not None
    if not static and not sharded and CpuSamplingModel.can_read(policy.base):
        return CpuSamplingModel(policy.base)
    module = policy.decoder()
    if static and GpuSamplingModel.can_read(module):
        # A gathered copy is used only here. An unsharded decoder shares its weights without LoRA with the policy.
        shared = () if sharded else policy.base.parameters()
        return GpuSamplingModel(module, {parameter.data_ptr() for parameter in shared})
    return PlainSamplingModel(module)


class CachedReference:
    """Caches the frozen reference in its fastest implementation, while its weights do not change."""

    def __init__(self) -> None:
        self._state: list[tuple[int, int]] = []
        self._model: CpuSamplingModel | None = None

    def __reduce__(self) -> tuple[type[CachedReference], tuple[()]]:
        # a copied policy must read its own weights, and packed weights of oneDNN cannot be copied
        return CachedReference, ()

    def read(self, model: nn.Module, with_adapter: bool = False) -> CpuSamplingModel | None:
        """`model` without its adapter, or with a frozen adapter; None if only transformers' layers support it."""
        if not CpuSamplingModel.can_read(model):
            return None
        # The address and the version counter of each tensor: they differ if weights were moved or written since.
        state = [(w.data_ptr(), w._version) for w in model.parameters() if not w.requires_grad]
        if self._model is None or self._state != state:
            self._state, self._model = state, CpuSamplingModel(model, with_adapter=with_adapter)
        return self._model
