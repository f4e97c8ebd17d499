"""The choice of the model that samples, and of the frozen reference's, by device, precision and family."""

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
    """The policy's weights as they are now, in the fastest form that can read them; else transformers' own layers.

    LoRA is added to a copy of the linear weights.

    Args:
        policy: a sharded policy must be inside `gathered`.
        static: a step takes all rows at fixed shapes, and the model is kept for later calls (`refresh`).
    """
    sharded = policy.sharded is not None
    if not static and not sharded and CpuSamplingModel.can_read(policy.base):
        return CpuSamplingModel(policy.base)
    module = policy.decoder()
    if static and GpuSamplingModel.can_read(module):
        # A gathered copy belongs to nobody else. An unsharded one shares the weights without LoRA with the policy.
        shared = () if sharded else policy.base.parameters()
        return GpuSamplingModel(module, {parameter.data_ptr() for parameter in shared})
    return PlainSamplingModel(module)


class CachedReference:
    """The frozen reference in its fastest form, kept from call to call while its weights are the same."""

    def __init__(self) -> None:
        self._state: list[tuple[int, int]] = []
        self._model: CpuSamplingModel | None = None

    def __reduce__(self) -> tuple[type[CachedReference], tuple[()]]:
        return CachedReference, ()  # a copied policy reads its own weights; what oneDNN has packed cannot be copied

    def read(self, model: nn.Module, with_adapter: bool = False) -> CpuSamplingModel | None:
        """`model` without its adapter, or with one that stays as it is; None if only transformers' layers can compute
        it."""
        if not CpuSamplingModel.can_read(model):
            return None
        # A tensor's address and its count of writes: another pair where weights were moved or written since.
        state = [(w.data_ptr(), w._version) for w in model.parameters() if not w.requires_grad]
        if self._model is None or self._state != state:
            self._state, self._model = state, CpuSamplingModel(model, with_adapter=with_adapter)
        return self._model
