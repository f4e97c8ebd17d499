"""The reference: the frozen model in the KL term. It is the initial policy, or a later policy after `refresh`.

It has one of three forms:

- a copy of the model (`QwenVL.reference_model`), if more than an adapter is trained;
- the policy without its adapter, if only an adapter is trained. This needs no memory;
- the policy with a frozen copy of its adapter, after such a reference was refreshed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_modules.models.inference.base import SamplingModel
from lightning_modules.models.inference.fastest import CachedReference
from lightning_modules.models.inference.plain_model import PlainSamplingModel
from lightning_modules.models.layers.lora import merged_copy, without_dropout

if TYPE_CHECKING:
    from lightning_modules.models.qwen_vl import QwenVL


class Reference:
    """The reference of a policy, in one of the three forms."""

    def __init__(self) -> None:
        self._cached = CachedReference()
        # the frozen copy of the adapter: name in `policy.model` -> tensor; empty means no adapter
        self._adapter: dict[str, Tensor] = {}

    @contextmanager
    def acting(self, policy: QwenVL) -> Iterator[SamplingModel]:
        """The reference of `policy` as a model, without gradient."""
        model = policy.base if policy.reference_model is None else policy.reference_model
        with torch.no_grad(), _exchanged(policy.model, self._adapter):
            cached = self._cached.read(model, with_adapter=bool(self._adapter))
            # With its adapter switched off, the policy's own model is the reference.
            switch_off = cached is None and model is policy.base and not self._adapter
            with policy.model.disable_adapter() if switch_off else nullcontext():
                yield cached or PlainSamplingModel(model)

    def refresh(self, policy: QwenVL) -> None:
        """Make the present policy the reference."""
        if policy.reference_model is None:
            self._adapter = {name: tensor.clone() for name, tensor in policy.trained_tensors()}
        else:
            _write(policy.reference_model, merged_copy(policy.base).state_dict())
        self._cached = CachedReference()

    def state_dict(self, policy: QwenVL) -> dict[str, Tensor]:
        """The tensors that the reference does not share with the policy, for the checkpoint."""
        if policy.reference_model is None:
            return dict(self._adapter)
        shared = {parameter.data_ptr() for parameter in policy.model.parameters()}
        state = policy.reference_model.state_dict()
        return {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in shared}

    def load_state_dict(self, policy: QwenVL, state: Mapping[str, Tensor]) -> None:
        if policy.reference_model is None:
            self._adapter = dict(state)
        else:
            _write(policy.reference_model, state)
        self._cached = CachedReference()


@torch.no_grad()
def _write(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `state` into those of `model`; shared tensors are not changed."""
    for name, tensor in model.state_dict().items():
        if name in state and tensor.data_ptr() != state[name].data_ptr():
            tensor.copy_(state[name])


@contextmanager
def _exchanged(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside this context, the parameters named in `tensors` have these values, and the adapter has no dropout.

    The data of the parameters are exchanged, not overwritten. An autograd graph of the policy may have saved the
    parameters for its backward pass, and in-place writes would make that pass fail.
    """
    parameters = dict(model.named_parameters()) if tensors else {}
    own = {name: parameters[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(parameters[name].device)  # a loaded tensor is on the CPU
            parameters[name].data = tensors[name]
        with without_dropout(model) if tensors else nullcontext():
            yield
    finally:
        for name, data in own.items():
            parameters[name].data = data
