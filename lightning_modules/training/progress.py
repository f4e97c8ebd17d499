"""Lightning's count of batches: the last of a run, and in a checkpoint taken back to where weights and data are."""

from __future__ import annotations

from typing import Any

from lightning import Trainer


def is_last_batch(trainer: Trainer) -> bool:
    """True in the training step of the last batch of the last epoch, which ends the run. Alike on all ranks."""
    if trainer.max_epochs in (None, -1) or trainer.current_epoch + 1 < trainer.max_epochs:
        return False
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return batches.is_last_batch or batches.current.ready >= trainer.num_training_batches


def rewind(fit_loop: dict[str, Any], num_batches: int) -> None:
    """Take the last `num_batches` batches off the saved state of a fit loop, in place.

    They may reach back over the starts of epochs, which all have as many batches. What is left is a state in the middle
    of an epoch; its very start counts as that too.
    """
    if num_batches == 0:
        return
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    done = batches["current"]["ready"]
    left, epochs_back = done - num_batches, 0
    if left < 0:
        length = (batches["total"]["ready"] - done) // (epochs["current"]["started"] - 1)
        epochs_back = -(left // length)
        left += epochs_back * length
    for name in ("ready", "started", "processed", "completed"):  # an open batch has the last still to come
        batches["total"][name] -= num_batches
        batches["current"][name] += left - done
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= num_batches  # the step that loggers are given
    for counts in epochs.values():
        started = counts["started"] - epochs_back
        counts.update(ready=started, started=started, processed=started - 1, completed=started - 1)
