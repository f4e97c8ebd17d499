"""Optimizer and learning-rate schedule of every phase.

Weight decay leaves out norms and biases, which are the tensors of one dimension, as Hugging Face's Trainer does for the
language model. (The Trainer goes by names, and so decays the vision tower's norm1, norm2 and ln_q; here it does not.)

The schedule is not quite that of Hugging Face's `get_cosine_schedule_with_warmup`: its warm-up is step / n, so that its
first update has a learning rate of 0 and moves nothing. Here it is (step + 1) / n, and the first update counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.training.endings import RunStopped


def cosine_factor(step: int, num_warmup: int, num_steps: int) -> float:
    """Share of the peak learning rate at update `step` (from 0): linear up over `num_warmup` updates to the peak at the
    last of them, then half a cosine down to 0 after `num_steps`."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def count_updates(trainer: Trainer, batches_per_window: int, updates_per_window: int) -> int:
    """Optimizer updates that `trainer` will make: its max_steps, or what its epochs hold, whichever is less. The last
    window may hold fewer batches than the others.

    A module that optimizes by hand counts in windows of several batches, which `trainer.estimated_stepping_batches`
    does not know. Raises ValueError when nothing bounds the run: a schedule needs an end.
    """
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        _ = trainer.estimated_stepping_batches  # builds the loader, and with it num_training_batches
        if math.isfinite(trainer.num_training_batches):
            num_batches = int(trainer.num_training_batches) * trainer.max_epochs
            limits.append(math.ceil(num_batches / batches_per_window) * updates_per_window)
    if not limits:
        raise ValueError(
            f"the cosine schedule needs an end: trainer.max_steps={trainer.max_steps} and "
            f"trainer.max_epochs={trainer.max_epochs} give none; set trainer.max_steps"
        )
    return max(min(limits), 1)


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: one in the given order, or two where decay must leave norms and biases out."""
    narrow = [parameter for parameter in parameters if parameter.dim() < 2] if weight_decay > 0 else []
    if not narrow:
        return [{"params": list(parameters), "weight_decay": weight_decay}]
    wide = [parameter for parameter in parameters if parameter.dim() >= 2]
    return [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}]


def require_same_groups(checkpoint: Mapping[str, Any], parameters: Sequence[nn.Parameter], weight_decay: float) -> None:
    """Raises RunStopped where the optimizer's state in a checkpoint is not that of these parameters in these groups."""
    needed = [len(group["params"]) for group in decay_groups(parameters, weight_decay)]
    for state in checkpoint.get("optimizer_states", ()):
        saved = [len(group["params"]) for group in state["param_groups"]]
        if saved != needed:
            raise RunStopped(
                f"the checkpoint's optimizer has groups of {saved} parameters, not {needed}: an earlier version wrote "
                f"it, whose weight_decay={weight_decay} reached norms and biases too.\nMove the phase's folder away to "
                "start afresh, or go on with that version"
            )


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup_fraction: float,
    num_updates: int,
    foreach: bool | None = None,
) -> tuple[AdamW, LambdaLR]:
    """AdamW and its cosine schedule over `num_updates`, the first `warmup_fraction` of them warm-up."""
    groups = decay_groups(parameters, weight_decay)
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay, foreach=foreach)
    num_warmup = math.ceil(warmup_fraction * num_updates)
    return optimizer, LambdaLR(optimizer, partial(cosine_factor, num_warmup=num_warmup, num_steps=num_updates))
