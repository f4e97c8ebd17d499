"""Optimizer and learning-rate schedule of both phases.

Norms and biases (all tensors with one dimension) have no weight decay. Hugging Face's Trainer does the same for the
language model. The Trainer selects tensors by name, and so it does decay norm1, norm2 and ln_q of the vision tower;
here these have no decay either.

The schedule differs slightly from Hugging Face's `get_cosine_schedule_with_warmup`. There the warm-up factor is
step / n, so the first update has a learning rate of 0 and changes nothing. Here it is (step + 1) / n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Trainer
from torch import nn

from datamodules.persistence.user_error import SettingsError
from lightning_modules.training.endings import RunStopped


def cosine_factor(step: int, num_warmup: int, num_steps: int) -> float:
    """The learning rate at update `step` (from 0), as a fraction of its peak.

    It rises linearly and reaches the peak at the last of `num_warmup` updates. Then it falls as half a cosine, to 0
    after `num_steps` updates.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))  # 0 also beyond the last planned update


def count_updates(trainer: Trainer, batches_per_window: int, updates_per_window: int) -> int:
    """The number of optimizer updates that `trainer` will make: the smaller of max_steps and the updates of its epochs.

    Args:
        trainer: the Trainer, with its settings max_steps and max_epochs.
        batches_per_window: number of batches in an accumulation window. The last window of a run may have fewer.
        updates_per_window: number of updates at the end of each window.

    Raises:
        SettingsError: neither setting limits the run; the schedule needs an end.
    """
    # Lightning's `estimated_stepping_batches` is not right here, because with manual optimization it does not know the
    # windows.
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        _ = trainer.estimated_stepping_batches  # reading it builds the loader, which sets num_training_batches
        if math.isfinite(trainer.num_training_batches):
            num_batches = int(trainer.num_training_batches) * trainer.max_epochs
            limits.append(math.ceil(num_batches / batches_per_window) * updates_per_window)
    if not limits:
        raise SettingsError(no_end(trainer.max_steps, trainer.max_epochs))
    return max(min(limits), 1)


def no_end(max_steps: int, max_epochs: int | None) -> str:
    """The problem that no setting of the Trainer limits a run."""
    return (
        f"the cosine schedule needs an end: trainer.max_steps={max_steps} and trainer.max_epochs={max_epochs} give "
        "none; set trainer.max_steps"
    )


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: one group in the given order, or two if decay must leave out norms and biases."""
    # Without weight decay, all parameters share one group in their given order.
    narrow = [parameter for parameter in parameters if parameter.dim() < 2] if weight_decay > 0 else []
    if not narrow:
        return [{"params": list(parameters), "weight_decay": weight_decay}]
    wide = [parameter for parameter in parameters if parameter.dim() >= 2]
    return [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}]


def require_same_groups(checkpoint: Mapping[str, Any], parameters: Sequence[nn.Parameter], weight_decay: float) -> None:
    """Check that the optimizer state of a checkpoint fits the parameter groups of this run.

    Raises:
        RunStopped: the groups differ.
    """
    needed = [len(group["params"]) for group in decay_groups(parameters, weight_decay)]
    for state in checkpoint.get("optimizer_states", ()):
        saved = [len(group["params"]) for group in state["param_groups"]]
        if saved != needed:
            raise RunStopped(
                f"the checkpoint's optimizer has groups of {saved} parameters, not {needed}: an earlier version wrote "
                f"it, whose weight_decay={weight_decay} reached norms and biases too.\nMove the phase's folder away to "
                "start afresh, or go on with that version"
            )
