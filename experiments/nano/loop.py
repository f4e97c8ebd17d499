"""The training loop of both stages of the nano base model: data-parallel steps, log, checkpoint, resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, distributed, nn

from datamodules.persistence.files import atomic_path, whole_folder
from experiments.nano.muon import Muon
from experiments.nano.settings import PretrainSettings
from lightning_modules.models.qwen_vl import QwenVL

CHECKPOINT, LOG = "checkpoint.pt", "training_log.jsonl"
FINAL = "final"  # folder of the finished model's files, until they replace those of the untrained one


class Stage(Protocol):
    """The data and the loss of one stage."""

    name: ClassVar[str]
    settings: PretrainSettings
    policy: QwenVL
    heads: nn.Module  # trained together with the policy, and discarded at the end
    num_steps: int
    learning_rate: float  # the peak

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[Any]:
        """This process's share of each batch, beginning with batch `start`."""

    def loss(self, batch: Any) -> tuple[float, int]:
        """Add the gradient of a sum of losses; returns the sum and the number of its terms."""

    def evaluate(self, num_eval: int) -> dict[str, float]:
        """Scores on `num_eval` held-out pictures, in per cent."""


def share_of(batch: int, size: int, rank: int, world_size: int) -> range:
    """The numbers of the pictures of one batch that belong to one process.

    Args:
        batch: number of the batch.
        size: number of pictures in a batch.
        rank: number of the process.
        world_size: number of processes.
    """
    return range(batch * size + rank, (batch + 1) * size, world_size)


def learning_rate_factor(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """The learning rate as a fraction of its peak: linear up, constant, linear down to zero.

    Args:
        step: number of the step, from 0.
        num_steps: number of steps of the stage.
        warmup: share of the steps in which it rises.
        decay: share of the steps in which it falls.
    """
    return min(1.0, (step + 1) / max(1, warmup * num_steps), (num_steps - step) / max(1, decay * num_steps))


def average_gradients(parameters: Sequence[Tensor], total: float, count: int) -> float:
    """Replace the gradients of this process's sum by the gradients of the mean over all processes.

    Args:
        parameters: parameters with the gradient of this process's sum of losses.
        total: this sum.
        count: the number of its terms.

    Returns:
        The mean loss over all processes.
    """
    # One all-reduce for all tensors, because many small ones would be slower.
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor([total, count], dtype=torch.float32)])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    *gradients, total_count = flat.split([*(p.numel() for p in parameters), 2])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient.view_as(parameter) / total_count[1])
    return (total_count[0] / total_count[1]).item()


def build_optimizers(named: Iterable[tuple[str, Tensor]], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside the network, AdamW for all other parameters.

    The others are embeddings, heads, biases, norms and the patch convolution.
    """
    matrices, rest = [], []
    for name, parameter in named:
        inside = parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "heads"))
        (matrices if inside else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=learning_rate), adamw]


class StageRun:
    """A stage in training: weights, optimizers, step and clock, from the folder's checkpoint if there is one."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.folder, self.policy = stage, folder, stage.policy
        # 1. The rank of this process and the number of processes.
        self.rank, self.world_size = 0, 1
        if distributed.is_initialized():
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        # 2. The trained parameters and their optimizers.
        named = [*self.policy.base.named_parameters(), *stage.heads.named_parameters("heads")]
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.optimizers = build_optimizers(named, stage.learning_rate)
        # 3. The checkpoint of this stage, or of the end of the previous stage; from the latter, only the weights are
        # used.
        self.step, seconds = 0, 0.0
        if (folder / CHECKPOINT).exists():
            state = torch.load(folder / CHECKPOINT, weights_only=True)
            seconds = state["seconds"]
            self.policy.base.load_state_dict(state["model"])
            if state["stage"] == stage.name:
                self.step = state["step"]
                stage.heads.load_state_dict(state["heads"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
        self.started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all stages and attempts."""
        return time.perf_counter() - self.started

    def train(self, save_every: int, eval_every: int, log_every: int) -> None:
        """Train to the end of the stage, and write a checkpoint there, from which the next stage starts.

        Args:
            save_every: steps between two checkpoints.
            eval_every: steps between two evaluations.
            log_every: steps between two records of the log.
        """
        losses: list[float] = []  # losses since the last record
        for batch in self.stage.batches(self.step, self.rank, self.world_size):
            losses.append(self.update(batch))
            # The first process logs before it saves, so that the log is never behind the checkpoint.
            if self.rank == 0:
                last = self.step == self.stage.num_steps
                if last or self.step % log_every == 0:
                    self.log(losses, self.num_eval(last, self.step % eval_every == 0))
                    losses = []
                if last or self.step % save_every == 0:
                    self.save()
        if distributed.is_initialized():
            distributed.barrier()  # no process reads the checkpoint before it is written

    def num_eval(self, last: bool, due: bool) -> int:
        """Number of pictures to evaluate now: all at the end of the stage, some if an evaluation is due, else none."""
        return self.stage.settings.num_eval if last else min(128, self.stage.settings.num_eval) * due

    def update(self, batch: Any) -> float:
        """Make one optimizer step; returns the loss of the whole batch before the step.

        `batch` is this process's share.
        """
        stage, settings = self.stage, self.stage.settings
        factor = learning_rate_factor(self.step, stage.num_steps, settings.warmup, settings.decay)
        # 1. Gradients: of this process's share, then the mean over all processes.
        loss = average_gradients(self.parameters, *stage.loss(batch))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        # 2. Step. All processes have the same gradients, so their weights stay equal.
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss

    def save(self) -> None:
        """Write the checkpoint, completely or not at all."""
        state = {
            "stage": self.stage.name,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.policy.base.state_dict(),
            "heads": self.stage.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_path(self.folder / CHECKPOINT) as draft:
            torch.save(state, draft)

    def log(self, losses: Sequence[float], num_eval: int) -> None:
        """Append a record to the log: the mean of the `losses` since the last one, and scores if `num_eval` > 0."""
        record: dict[str, Any] = {
            "stage": self.stage.name,
            "step": self.step,
            "loss": sum(losses) / len(losses),
            "seconds": round(self.seconds, 1),
        }
        if num_eval:
            record |= self.stage.evaluate(num_eval)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def finish(self) -> None:
        """Save the model and remove the checkpoint."""
        if self.rank == 0:
            # Each file is complete or the old one: a run that was killed here first loads the model's files.
            with whole_folder(self.folder / FINAL) as draft:
                self.policy.base.save_pretrained(draft)
            for file in (self.folder / FINAL).iterdir():
                file.replace(self.folder / file.name)
            (self.folder / FINAL).rmdir()
            (self.folder / CHECKPOINT).unlink()  # a folder without a checkpoint counts as finished
