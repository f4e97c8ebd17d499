"""Lightning's batch counters: find the last batch of a run, and set back the counters in a checkpoint."""

from __future__ import annotations

from typing import Any

from lightning import Trainer


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the current training step has the last batch of the last epoch. The same on all ranks."""
    if trainer.max_epochs in (None, -1) or trainer.current_epoch + 1 < trainer.max_epochs:
        return False
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return batches.is_last_batch or batches.current.ready >= trainer.num_training_batches


def has_used_all_batches(trainer: Trainer) -> bool:
    """Whether a run that has ended came to its last batch. It may have been stopped before, also in the last epoch."""
    if trainer.max_epochs in (None, -1) or trainer.current_epoch < trainer.max_epochs:  # counts the ended epochs now
        return False
    return is_last_batch(trainer)


def rewind(fit_loop: dict[str, Any], num_batches: int) -> None:
    """Set the saved state of a fit loop back by `num_batches` batches, in place.

    A checkpoint inside an accumulation window needs this: the gradient of the open window is not saved, so its batches
    are repeated. They may belong to earlier epochs. All epochs have the same number of batches.

    A training step that has ended with an error is counted like one that has returned: its batch goes back with its
    window, or its window is trained on. Otherwise Lightning would begin one batch too early, and the run would be
    longer by this batch.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["processed"] = counts["ready"]
    if num_batches == 0:
        return
    # 1. Number of epochs to go back, and the batch in that epoch.
    done = batches["current"]["ready"]
    left, epochs_back = done - num_batches, 0
    if left < 0:
        length = (batches["total"]["ready"] - done) // (epochs["current"]["started"] - 1)
        epochs_back = -(left // length)
        left += epochs_back * length
    # 2. The counters of batches. All four go back by the same number, because a batch in progress has not yet counted
    # in the last of them.
    for name in ("ready", "started", "processed", "completed"):
        batches["total"][name] -= num_batches
        batches["current"][name] += left - done
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= num_batches  # the step number that loggers get
    # 3. The counters of epochs: the state is now inside an epoch, possibly at its start.
    for counts in epochs.values():
        started = counts["started"] - epochs_back
        counts.update(ready=started, started=started, processed=started - 1, completed=started - 1)
