"""Lightning's strategy for a policy whose decoder layers are sharded over all ranks (FSDP2, see `models/fsdp.py`).

    trainer:
      strategy: sharded

A checkpoint is one file with full tensors, the same as without sharding. So a run can resume from it with any number of
ranks, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.models.fsdp import full_tensor, local_shard

PREFIX = "policy.model."  # prefix of the names of trained parameters in a PolicyModule


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks.

    The policy is sharded when training is set up, after the `setup` of all callbacks. So rejection sampling, which runs
    in a callback's `setup`, still has the full weights.

    Args:
        settings: the other arguments of Lightning's strategy, such as process_group_backend, and timeout of one
            collective operation. `RankWatch` notices a dead rank much sooner.
    """

    def __init__(self, **settings: Any) -> None:
        # A checkpoint is one file, not Lightning's folder with one file for each rank.
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the trainer passes the optimizer state of a checkpoint to `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Use all ranks of all nodes for data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the policy before Lightning makes the optimizer, so that the optimizer sees the sharded parameters."""
        self.lightning_module.policy.shard(self.device_mesh["data_parallel"])
        super().setup(trainer)

    # Saving: gathering a full tensor is a collective operation, so every rank takes part. Only rank 0 keeps the result.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights as full tensors on the CPU; empty on all ranks except rank 0."""
        tensors = self.lightning_module.policy.trained_tensors()
        return {PREFIX + name: tensor.cpu() for name, tensor in tensors if self.is_global_zero}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's shard of each full tensor into the parameters."""
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, tensor in checkpoint["state_dict"].items():
                parameters[name].copy_(local_shard(tensor, parameters[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state with full tensors."""
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        gathered = {number: _gather(values, self.is_global_zero) for number, values in state["state"].items()}
        return {"state": gathered, "param_groups": _with_foreach(state, None)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizer this rank's shard of each full tensor."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                number: {name: _scatter(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": sharded, "param_groups": _with_foreach(saved, False)})

    # ModelParallelStrategy's own versions of these two methods would use another file format.
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint


def _with_foreach(state: Mapping[str, Any], foreach: bool | None) -> list[dict[str, Any]]:
    """Set `foreach` in the parameter groups of an optimizer state."""
    # A checkpoint contains None, so that the run that loads it decides. A sharded run needs False: foreach operations
    # do not accept sharded and full tensors together.
    return [group | {"foreach": foreach} for group in state["param_groups"]]


def _gather(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """The optimizer state of one parameter with full tensors. Without `keep`, the tensors are replaced by None."""
    gathered = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensor = full_tensor(value)  # a collective operation, so every rank calls it
            value = tensor.cpu() if keep else None
        gathered[name] = value
    return gathered


def _scatter(value: Any, parameter: Tensor) -> Any:
    """This rank's shard of a full tensor in the optimizer state; other values, such as AdamW's step, unchanged."""
    is_like = isinstance(value, Tensor) and value.shape == parameter.shape
    return local_shard(value, parameter) if is_like else value


StrategyRegistry.register("sharded", ShardedStrategy, description="decoder layers sharded over ranks (FSDP2)")
