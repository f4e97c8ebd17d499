"""Optimizer and learning-rate schedule of every phase."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from lightning import Trainer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def cosine_factor(step: int, num_warmup: int, num_steps: int) -> float:
    """Share of the peak learning rate at update `step` (from 0): linear up over `num_warmup` updates to the peak at the
    last of them, then half a cosine down to 0 after `num_steps`."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def count_updates(trainer: Trainer, batches_per_window: int, updates_per_window: int) -> int:
    """Optimizer updates that `trainer` will make: its max_steps, or what its epochs hold, whichever is less.

    A module that optimizes by hand counts in windows of several batches, which `trainer.estimated_stepping_batches`
    does not know. Raises ValueError when nothing bounds the run: a schedule needs an end.
    """
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        _ = trainer.estimated_stepping_batches  # builds the loader, and with it num_training_batches
        if math.isfinite(trainer.num_training_batches):
            num_batches = int(trainer.num_training_batches) * trainer.max_epochs
            limits.append(num_batches // batches_per_window * updates_per_window)
    if not limits:
        raise ValueError(
            f"the cosine schedule needs an end: trainer.max_steps={trainer.max_steps} and "
            f"trainer.max_epochs={trainer.max_epochs} give none; set trainer.max_steps"
        )
    return max(min(limits), 1)


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup_fraction: float,
    num_updates: int,
    foreach: bool | None = None,
) -> tuple[AdamW, LambdaLR]:
    """AdamW and its cosine schedule over `num_updates`, the first `warmup_fraction` of them warm-up."""
    optimizer = AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, foreach=foreach)
    num_warmup = math.ceil(warmup_fraction * num_updates)
    return optimizer, LambdaLR(optimizer, partial(cosine_factor, num_warmup=num_warmup, num_steps=num_updates))
