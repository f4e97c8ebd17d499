"""The training loop of both stages of the nano base: data-parallel steps, log, checkpoint, resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, distributed, nn

from datamodules.persistence.files import atomic_path
from experiments.nano.muon import Muon
from experiments.nano.settings import BaseSettings
from lightning_modules.models.qwen_vl import QwenVL

CHECKPOINT, LOG = "checkpoint.pt", "training_log.jsonl"


class Stage(Protocol):
    """What is learned, from which pictures. `heads` is what is trained beside the policy and thrown away at the end."""

    name: ClassVar[str]
    settings: BaseSettings
    policy: QwenVL
    heads: nn.Module
    num_steps: int
    learning_rate: float

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[Any]:
        """This process's share of each batch, from batch `start` on."""

    def loss(self, batch: Any) -> tuple[float, int]:
        """A sum of losses and how many they are; adds the sum's gradient."""

    def evaluate(self, num_eval: int) -> dict[str, float]:
        """Scores on held-out pictures, in per cent."""


def share_of(batch: int, size: int, rank: int, world_size: int) -> range:
    """Numbers of the pictures that process `rank` takes of batch number `batch`."""
    return range(batch * size + rank, (batch + 1) * size, world_size)


def learning_rate_factor(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """Linear up, flat, linear down to zero."""
    return min(1.0, (step + 1) / max(1, warmup * num_steps), (num_steps - step) / max(1, decay * num_steps))


def average_gradients(parameters: Sequence[Tensor], total: float, count: int) -> float:
    """Turn each process's gradient of a sum into that of the mean over all processes; returns the mean loss."""
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor([total, count], dtype=torch.float32)])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    *gradients, total_count = flat.split([*(p.numel() for p in parameters), 2])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient.view_as(parameter) / total_count[1])
    return (total_count[0] / total_count[1]).item()


def build_optimizers(named: Iterable[tuple[str, Tensor]], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks, AdamW for embeddings, heads, biases, norms, patch convolution."""
    matrices, rest = [], []
    for name, parameter in named:
        inside = parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "heads"))
        (matrices if inside else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=learning_rate), adamw]


class StageRun:
    """A stage at some step: weights, optimizers and clock; from the folder's checkpoint if there is one."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.folder, self.policy = stage, folder, stage.policy
        self.rank, self.world_size = 0, 1
        if distributed.is_initialized():
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        named = [*self.policy.base.named_parameters(), *stage.heads.named_parameters("heads")]
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.optimizers = build_optimizers(named, stage.learning_rate)
        self.step, seconds = 0, 0.0
        if (folder / CHECKPOINT).exists():
            state = torch.load(folder / CHECKPOINT, weights_only=True)
            seconds = state["seconds"]
            self.policy.base.load_state_dict(state["model"])
            if state["stage"] == stage.name:  # else it is the end of the stage before
                self.step = state["step"]
                stage.heads.load_state_dict(state["heads"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
        self.started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Of training so far, over all stages and attempts."""
        return time.perf_counter() - self.started

    def train(self, save_every: int, eval_every: int, log_every: int) -> None:
        """To the end of the stage; the last checkpoint is what the next stage, or `finish`, starts from."""
        losses: list[float] = []
        for batch in self.stage.batches(self.step, self.rank, self.world_size):
            losses.append(self.update(batch))
            if self.rank == 0:
                last = self.step == self.stage.num_steps
                if last or self.step % log_every == 0:
                    self.log(losses, self.num_eval(last, self.step % eval_every == 0))
                    losses = []
                if last or self.step % save_every == 0:
                    self.save()
        if distributed.is_initialized():
            distributed.barrier()  # the checkpoint is written before anybody reads it

    def num_eval(self, last: bool, due: bool) -> int:
        return self.stage.settings.num_eval if last else min(128, self.stage.settings.num_eval) * due

    def update(self, batch: Any) -> float:
        """One step on this process's share of a batch; returns the loss of the whole batch before it."""
        stage, settings = self.stage, self.stage.settings
        factor = learning_rate_factor(self.step, stage.num_steps, settings.warmup, settings.decay)
        loss = average_gradients(self.parameters, *stage.loss(batch))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
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
        """Append the mean of the `losses` since the last record and, with `num_eval` pictures, the scores on them."""
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
        """Save the model and drop the checkpoint, which marks the folder as finished."""
        if self.rank == 0:
            self.policy.base.save_pretrained(self.folder)
            (self.folder / CHECKPOINT).unlink()
