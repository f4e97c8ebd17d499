"""FSDP2: the weights, gradients and optimizer state of each decoder layer are sharded over all ranks.

The weights of a layer are gathered for its forward pass and for its backward pass, and freed after each. Its gradients
are summed over ranks, and each rank keeps its own shard of the sum. Embeddings, head, last norm and vision tower are
replicated: head and tower run a different number of times on each rank, but gathering is a collective operation.
Sampling runs on a full copy that is gathered once per rollout (`ShardedModel`), because gathering all layers for each
token would take longer than computing the token.
"""

from __future__ import annotations

import copy
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
    """Shard the decoder layers of `model` over the ranks of the one-dimensional `mesh`, in place."""
    from torch.distributed.fsdp import fully_shard

    decoder, layers = architecture.text_model(model), architecture.decoder_layers(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    others = {p for p in decoder.parameters() if id(p) not in inside}
    # The decoder is the common root of the layers, so that each layer prefetches the next one. Its own weights are not
    # sharded.
    units = [fully_shard(layer, mesh=mesh) for layer in layers]
    units.append(fully_shard(decoder, mesh=mesh, ignored_params=others))
    for unit in units:
        # FSDP would average gradients. Sums are needed, because PolicyModule divides once, by the tokens or completions
        # of all ranks.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full value of a tensor. If it is sharded, all ranks must call this together, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Convert a full `tensor` to the placement of `like`: sharded if `like` is sharded. No communication."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(device=like.device, dtype=tensor.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class ShardedModel:
    """A model with sharded decoder layers; it can make full copies of itself."""

    def __init__(self, model: nn.Module, architecture: Architecture, mesh: DeviceMesh) -> None:
        """Shards the decoder layers of `model`, in place."""
        self.model = model
        self._gathered: nn.Module | None = None
        # Sharding changes the modules. Full copies are made from a structure without weights that is saved before
        # sharding.
        memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self._structure = copy.deepcopy(model, memo)
        shard_layers(model, architecture, mesh)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep a full copy for `decoder` inside the context.

        All ranks must enter together. Inside, each rank may decode independently of the others. A nested call does
        nothing.
        """
        if self._gathered is not None:
            yield
            return
        self._gathered = self.copy().eval()
        try:
            yield
        finally:
            self._gathered = None

    def decoder(self) -> nn.Module:
        """The gathered copy. Raises RuntimeError outside `gathered`."""
        if self._gathered is None:
            raise RuntimeError("the policy is sharded over ranks: decode inside `gathered`, which all ranks enter")
        return self._gathered

    def copy(self, device: torch.device | str | None = None) -> nn.Module:
        """A full copy of the model as it is now, with each LoRA layer merged. All ranks must call this together.

        Layers are gathered one by one, so that at most the copy and one layer are in memory.

        Args:
            device: device of the copy; None takes the device of the model. Replicated tensors are shared unless the
                device differs.
        """
        parameters = dict(self.model.named_parameters())

        def gather(name: str) -> nn.Parameter:
            tensor = full_tensor(parameters[name].detach())
            return nn.Parameter(tensor if device is None else tensor.to(device), requires_grad=False)

        memo: dict[int, object] = {id(buffer): buffer for buffer in self._structure.buffers()}
        for path, module in self._structure.named_modules():
            if isinstance(module, LoraLinear):
                own = {id(parameter): gather(f"{path}.{name}") for name, parameter in module.named_parameters()}
                memo[id(module)] = merged_layer(copy.deepcopy(module, own))
                # The loop below must not gather the parameters of this layer again.
                memo |= {id(parameter): parameter for parameter in module.parameters()}
        for name, parameter in self._structure.named_parameters():
            if id(parameter) not in memo:
                memo[id(parameter)] = gather(name)
        return copy.deepcopy(self._structure, memo)


def sum_gradients(parameters: Sequence[nn.Parameter], add_up: Callable[[Tensor], Tensor] | None) -> None:
    """Replace every gradient by its sum over ranks; a rank without a gradient adds zeros.

    Args:
        parameters: all trained parameters, in the same order on each rank. Gradients of sharded parameters are not
            changed, because FSDP has summed them in the backward pass.
        add_up: returns the sum of a tensor over ranks; None if there is one rank.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    replicated = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if add_up is None or not replicated:
        return
    # One collective operation for all gradients together.
    flat = add_up(torch.cat([parameter.grad.flatten() for parameter in replicated]))
    pieces = flat.split([parameter.numel() for parameter in replicated])
    for parameter, piece in zip(replicated, pieces, strict=True):
        parameter.grad.copy_(piece.view_as(parameter))


def clip_sharded(parameters: Sequence[nn.Parameter], limit: float, add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """`clip_grad_norm_` for sharded and replicated gradients together; torch's function does not support this mixture.

    Args:
        parameters: parameters whose gradients are summed over ranks (`sum_gradients`).
        limit: largest norm of all gradients together.
        add_up: returns the sum of a tensor over ranks.

    Returns:
        The norm before clipping.
    """
    sharded = [p.grad.to_local() for p in parameters if isinstance(p, DTensor)]
    replicated = [p.grad for p in parameters if not isinstance(p, DTensor)]
    # The squared norm is the sum over the shards of all ranks, plus the replicated gradients once.
    of_shards = torch.nn.utils.get_total_norm([shard for shard in sharded if shard.numel()]) ** 2
    norm = (add_up(of_shards.double()) + torch.nn.utils.get_total_norm(replicated).double() ** 2).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as in torch's clip_grad_norm_
    for gradient in sharded + replicated:
        gradient.mul_(scale.to(gradient.dtype))
    return norm
