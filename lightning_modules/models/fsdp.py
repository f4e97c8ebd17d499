"""FSDP2: each decoder layer's weights, gradients and optimizer state divided over all ranks.

A layer is gathered for its forward and its backward pass and let go after each; its gradients come back as sums over
ranks, of which every rank keeps its part. Embeddings, head, last norm and vision tower every rank has whole: head and
tower run a different number of times on each rank, which a gathering must not. Decoding runs on a whole copy, gathered
once for a rollout (`ShardedModel`): to gather all layers for each token would take longer than the token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_modules.models.architectures.base import Architecture
from lightning_modules.models.layers.lora import merged_layer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_layers(model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
    """Divide the decoder layers of `model` over the ranks of the one-dimensional `mesh`, in place."""
    from torch.distributed.fsdp import fully_shard

    decoder, layers = architecture.text_model(model), architecture.decoder_layers(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    others = {p for p in decoder.parameters() if id(p) not in inside}
    # The decoder is the layers' common root, through which one prefetches the next; it divides nothing of its own.
    units = [fully_shard(layer, mesh=mesh) for layer in layers]
    units.append(fully_shard(decoder, mesh=mesh, ignored_params=others))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)  # sums: PolicyModule divides, by tokens or completions
        unit.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is divided: all ranks call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this rank holds it: divided if `like` is. No rank waits for another."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(device=like.device, dtype=tensor.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class ShardedModel:
    """A model with divided layers, and plain copies of it: its structure is kept from before they were divided."""

    def __init__(self, model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
        """Divides the decoder layers of `model`."""
        self.model = model
        self._gathered: dict[bool, nn.Module] | None = None  # by whether LoRA is merged
        memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self._structure = copy.deepcopy(model, memo)
        shard_layers(model, architecture, mesh)

    @contextmanager
    def gathered(self, merge_lora: bool = True) -> Iterator[None]:
        """Keeps a whole copy while inside, for `decoder`. All ranks enter together; each then decodes as often as it
        likes. Entered again inside, it does nothing."""
        if self._gathered is not None:
            yield
            return
        self._gathered = {merge_lora: self.copy(merge_lora).eval()}
        try:
            yield
        finally:
            self._gathered = None

    def decoder(self, merge_lora: bool) -> nn.Module:
        if self._gathered is None:
            raise RuntimeError("the policy is divided over ranks: decode inside `gathered`, which all ranks enter")
        return self._gathered[merge_lora]

    def copy(self, merge_lora: bool = True, device: torch.device | str | None = None) -> nn.Module:
        """The model as it is now, undivided, on `device` (None: where it is); all ranks call it.

        With `merge_lora` each LoRA layer is one linear layer with its delta added, which is all that is kept of it: at
        no time are more than the copy and one layer there. What is not divided is shared unless it changes its device.
        """
        parameters = dict(self.model.named_parameters())

        def gather(name: str) -> nn.Parameter:
            tensor = whole(parameters[name].detach())
            return nn.Parameter(tensor if device is None else tensor.to(device), requires_grad=False)

        memo: dict[int, object] = {id(buffer): buffer for buffer in self._structure.buffers()}
        for path, module in self._structure.named_modules():
            if merge_lora and isinstance(module, LoraLinear):
                memo[id(module)] = merged_layer(_filled(module, functools.partial(_inside, gather, path)))
                memo |= {id(parameter): parameter for parameter in module.parameters()}  # done with
        for name, parameter in self._structure.named_parameters():
            if id(parameter) not in memo:
                memo[id(parameter)] = gather(name)
        return copy.deepcopy(self._structure, memo)


def _inside(gather: Callable[[str], nn.Parameter], path: str, name: str) -> nn.Parameter:
    return gather(f"{path}.{name}")


def _filled(module: nn.Module, gather: Callable[[str], nn.Parameter]) -> nn.Module:
    return copy.deepcopy(module, {id(parameter): gather(name) for name, parameter in module.named_parameters()})


def sum_gradients(parameters: Sequence[nn.Parameter], add_up: Callable[[Tensor], Tensor] | None) -> None:
    """Make every gradient the sum over ranks, zeros where a rank has none. `add_up` is that of a plain tensor (null: of
    one rank); gradients of divided parameters are summed already, in the backward pass."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    kept_whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if add_up is None or not kept_whole:
        return
    flat = add_up(torch.cat([parameter.grad.flatten() for parameter in kept_whole]))
    pieces = flat.split([parameter.numel() for parameter in kept_whole])
    for parameter, piece in zip(kept_whole, pieces, strict=True):
        parameter.grad.copy_(piece.view_as(parameter))


def clip_divided(parameters: Sequence[nn.Parameter], limit: float, add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """`clip_grad_norm_` for gradients of which some are divided: torch's takes no mixture. Returns the norm before."""
    divided = [p.grad.to_local() for p in parameters if isinstance(p, DTensor)]
    kept_whole = [p.grad for p in parameters if not isinstance(p, DTensor)]
    own = torch.nn.utils.get_total_norm([part for part in divided if part.numel()]) ** 2
    norm = (add_up(own.double()) + torch.nn.utils.get_total_norm(kept_whole).double() ** 2).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's
    for gradient in divided + kept_whole:
        gradient.mul_(scale.to(gradient.dtype))
    return norm
