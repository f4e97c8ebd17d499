"""Write checkpoints, keep some of them, and make sure that each file is complete or absent, on every filesystem."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from datamodules.persistence.files import UNFINISHED, atomic_path, remove_draft, storage_error
from datamodules.persistence.problems import Problems
from lightning_modules.training.endings import IdleTooLong, RunStopped

log = logging.getLogger(__name__)

STEP = "step-"  # first part of a checkpoint's name; the number of updates follows
INTERRUPTED = "interrupted.ckpt"  # the checkpoint of SaveOnInterrupt


class WholeCheckpoints(TorchCheckpointIO):
    """Writes <path>.unfinished in the folder of the checkpoint, and renames it after it is safely on the disk.

    Lightning's own class writes to the system's folder for temporary files and moves the file from there. If that is
    another filesystem, the move is a copy over the old checkpoint, and a kill or a full disk destroys both.

    The parent of the checkpoint's folder must exist. So if a mounted filesystem is gone, nothing is written into the
    empty mount point.

    Raises:
        OSError: the file cannot be written. The message has the path and the free space; the partial file is removed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as draft, draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # or a power failure could leave an empty file under the final name
        except (OSError, RuntimeError) as error:  # torch's writer turns an OSError of its file into a RuntimeError
            raise storage_error(error, path) from error


def log_batch(trainer: Trainer) -> None:
    """Log the metrics of the batch now, in `on_train_batch_end`, before a checkpoint is written.

    Lightning logs them after all callbacks. A kill between the checkpoint and that moment would lose the row, because a
    run that resumes from the checkpoint does not repeat the batch. Lightning then logs the row a second time; the
    loggers drop the repetition.
    """
    trainer._logger_connector.update_train_step_metrics()


def save(trainer: Trainer, path: Path) -> str | None:
    """Write a checkpoint. Every rank calls this. Every rank returns the error of rank 0, or None if it succeeded."""
    error = None
    try:
        trainer.save_checkpoint(path)
    except OSError as failure:
        error = str(failure)
        trainer.strategy.barrier("Trainer.save_checkpoint")  # the other ranks wait at this barrier inside Lightning
    error = trainer.strategy.broadcast(error)
    if error is not None and trainer.is_global_zero:
        log.warning("no checkpoint at step %d: %s", trainer.global_step, error)
    return error


def newest(folder: str | Path, without: Collection[str] = ()) -> Path | None:
    """The checkpoint with the most updates in a folder, or None; names in `without` are ignored.

    It compares numbers of updates, not modification times: clocks can jump back, and copying a folder changes every
    time. At the same number of updates, the checkpoint of an interruption wins, because it was written later.
    """
    files = [file for file in Path(folder).glob("*.ckpt") if file.name not in without]
    return max(files, key=lambda file: (num_updates(file), not file.name.startswith(STEP)), default=None)


def num_updates(file: Path) -> int:
    """The number of optimizer updates of a checkpoint, from its name or else from its content."""
    if file.name.startswith(STEP):
        return int(file.stem.removeprefix(STEP))
    return torch.load(file, mmap=True, weights_only=True)["global_step"]  # mmap: no weights are read


class WindowCheckpoint(Checkpoint):
    """Writes checkpoints <dirpath>/step-00000120.ckpt during training, and one at the end.

    A checkpoint is written only at the end of an accumulation window. So it never holds a half-used window of rollouts
    or a half-accumulated gradient. If a window makes several updates, the first end of a window at or after a multiple
    of `every_n_steps` counts.

    If a checkpoint cannot be written, a warning is logged, older checkpoints stay, and the next one is tried at its
    usual time. A run that ends because it learns nothing is saved after its last batch.

    Args:
        dirpath: folder of the checkpoints; by default <default_root_dir>/checkpoints.
        every_n_steps: updates between two checkpoints; null switches this off.
        every_n_minutes: minutes between two checkpoints; null switches this off.
        keep_last: number of newest checkpoints that are kept.
        keep_every: also keep, forever, the first checkpoint at or after each multiple of this number of updates.
        monitor: name of a metric. The checkpoints with its best values are kept too. A warning is logged, once, if the
            metric is not logged.
        mode: whether the highest ("max") or the lowest ("min") value is best.
        keep_best: number of best checkpoints that are kept.
        max_failures: after this number of failures in a row, the run ends with RunStopped.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep_last: int = 1,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        keep_best: int = 1,
        max_failures: int = 3,
    ) -> None:
        self.dirpath = dirpath
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self.monitor, self.mode, self.max_failures = monitor, mode, max_failures
        problems = Problems()
        problems.positive_or_null(every_n_steps=every_n_steps, every_n_minutes=every_n_minutes, keep_every=keep_every)
        problems.at_least(1, keep_last=keep_last, keep_best=keep_best, max_failures=max_failures)
        problems.one_of(("min", "max"), mode=mode)
        problems.raise_all("WindowCheckpoint")
        self.scores: dict[str, float] = {}  # file name -> value of `monitor`; only rank 0 uses it
        self._failures = 0  # in a row
        self._missed = False  # the warning that `monitor` is not logged has been given
        self._last_step = 0  # number of updates after the previous batch
        self._saved_batches = 0  # number of batches at the last checkpoint
        self._saved_at = 0.0  # time of the last checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and remove partial files that a kill has left there."""
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        if trainer.is_global_zero and stage == "fit":
            for draft in Path(self.dirpath).glob(f"*.ckpt{UNFINISHED}"):
                remove_draft(draft)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = dict(state_dict["scores"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _require_the_same(trainer)
        self._saved_at = time.monotonic()
        self._saved_batches = _num_batches(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write a checkpoint if one is due by updates or by time."""
        # By updates: this batch has passed a multiple. Updates happen only at the end of a window.
        last, self._last_step = self._last_step, trainer.global_step
        due = self.every_n_steps and last // self.every_n_steps < trainer.global_step // self.every_n_steps
        # By time: at the end of a window. The clocks of the ranks differ, so rank 0 decides for all.
        if self.every_n_minutes and not getattr(pl_module, "window_is_open", False):
            due = trainer.strategy.broadcast(due or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)
        if due:
            log_batch(trainer)
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoint, unless one was written after the last batch."""
        if _num_batches(trainer) != self._saved_batches:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a run that ends because it learns nothing: its weights are good, and all ranks raise this together."""
        if isinstance(exception, IdleTooLong):
            log_batch(trainer)  # the row that shows why the run ends
            self.on_train_end(trainer, pl_module)

    def _save(self, trainer: Trainer) -> None:
        """Write a checkpoint and remove those that are no longer kept. Raises RunStopped after `max_failures`."""
        path = Path(self.dirpath) / f"{STEP}{trainer.global_step:08d}.ckpt"
        # 1. The score, from the values that were logged last.
        score = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        # A misspelt name would silently keep nothing, so it is reported. Only rank 0 knows all metrics (MIGBench's).
        if self.monitor and score is None and not self._missed and trainer.is_global_zero:
            self._missed = True
            known = ", ".join(sorted(trainer.callback_metrics))
            words = "step %d has no score: monitor=%r is not logged so far; %s are"
            log.warning(words, trainer.global_step, self.monitor, known)
        if score is not None and not torch.isnan(score):
            self.scores[path.name] = float(score)
        # 2. The file.
        error = save(trainer, path)
        self._saved_at = time.monotonic()  # after a failure too: the next attempt waits for its usual time
        if error is None:
            self._failures, self._saved_batches = 0, _num_batches(trainer)
            if trainer.is_global_zero:
                self._remove_old(trainer)
                # The run has gone on from the checkpoint of an interruption. This one is newer, perhaps with the same
                # number of updates: windows in which nothing is learnt have none.
                path.with_name(INTERRUPTED).unlink(missing_ok=True)
            return
        # 3. It could not be written.
        self.scores.pop(path.name, None)
        self._failures += 1
        if self._failures >= self.max_failures:
            raise RunStopped(
                f"stopped at step {trainer.global_step}: {self._failures} checkpoints in a row could not be written, "
                f"the last because {error}. The last good one is {newest(self.dirpath)}: the same command goes on there"
            )

    def _remove_old(self, trainer: Trainer) -> None:
        """Remove all checkpoints except the last ones, those of `keep_every`, and the best ones."""
        files = {num_updates(file): file for file in Path(self.dirpath).glob(f"{STEP}*.ckpt")}
        kept = set(sorted(files)[-self.keep_last :])
        if self.keep_every:
            # Descending order: the smallest step of each multiple is written last into the dictionary.
            marks = {step // self.keep_every: step for step in sorted(files, reverse=True)}
            kept |= {step for mark, step in marks.items() if mark > 0}
        sign = 1 if self.mode == "max" else -1
        scored = [step for step, file in files.items() if file.name in self.scores]
        best = sorted(scored, key=lambda step: (-sign * self.scores[files[step].name], step))
        kept |= set(best[: self.keep_best])
        for step in files.keys() - kept:
            self.scores.pop(files[step].name, None)
            trainer.strategy.remove_checkpoint(files[step])


def _require_the_same(trainer: Trainer) -> None:
    """Raise RunStopped if this rank resumes from another checkpoint than rank 0.

    Every rank chooses the checkpoint itself. The choices differ if a file reads differently on another machine.
    """
    mine = Path(trainer.ckpt_path).name if trainer.ckpt_path else None
    first = trainer.strategy.broadcast(mine)
    if mine != first:
        raise RunStopped(f"rank {trainer.global_rank} goes on from {mine}, the first rank from {first}: start again")


def _num_batches(trainer: Trainer) -> int:
    """Number of batches that this run has begun, over all epochs and attempts."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready
