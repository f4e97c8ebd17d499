"""Lightning's strategy for a policy whose layers are divided over all ranks (FSDP2, see `sharding`).

    trainer:
      strategy: sharded

Checkpoints are those of an undivided run, in one file: any number of ranks, divided or not, goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.models.fsdp import own_part, whole

PREFIX = "policy.model."  # of the trained parameters in a PolicyModule


class ShardedStrategy(ModelParallelStrategy):
    """One group of all ranks. The policy is divided when training is set up, behind all callbacks' own setup: rejection
    sampling still has it whole. `timeout`: of a collective; a rank that has died is noticed much sooner (`RankWatch`).
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        self.lightning_module.policy.shard(self.device_mesh["data_parallel"])
        super().setup(trainer)

    # Whole tensors in checkpoints. Every rank takes part in gathering; only the first keeps anything.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        tensors = self.lightning_module.policy.trained_tensors()
        return {PREFIX + name: tensor.cpu() for name, tensor in tensors if self.is_global_zero}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, tensor in checkpoint["state_dict"].items():
                parameters[name].copy_(own_part(tensor, parameters[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        gathered = {number: _gather(values, self.is_global_zero) for number, values in state["state"].items()}
        return {"state": gathered, "param_groups": _with_foreach(state, None)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            divided = {
                number: {name: _scatter(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": divided, "param_groups": _with_foreach(saved, False)})

    # Lightning's own would bring its other format.
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint


def _with_foreach(state: Mapping[str, Any], foreach: bool | None) -> list[dict[str, Any]]:
    """The groups of a state: a file says nothing of how a run computes; divided beside whole tensors need False."""
    return [group | {"foreach": foreach} for group in state["param_groups"]]


def _gather(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    gathered = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensor = whole(value)  # on every rank
            value = tensor.cpu() if keep else None
        gathered[name] = value
    return gathered


def _scatter(value: Any, parameter: Tensor) -> Any:
    is_like = isinstance(value, Tensor) and value.shape == parameter.shape  # else a number, as AdamW's count of steps
    return own_part(value, parameter) if is_like else value


StrategyRegistry.register("sharded", ShardedStrategy, description="decoder layers divided over ranks (FSDP2)")
