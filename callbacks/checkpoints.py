"""When checkpoints are written, which are kept, and that they are whole or absent on every filesystem."""

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
from lightning_modules.training.endings import IdleTooLong, RunStopped

log = logging.getLogger(__name__)

STEP = "step-"  # and the number of updates: the name of a checkpoint


class WholeCheckpoints(TorchCheckpointIO):
    """Writes <path>.unfinished beside the checkpoint's place and renames it once it is on the disk.

    Lightning's own writes to the folder for temporary files and moves it from there: where that is another filesystem,
    the move is a copy onto the old checkpoint, and a kill or a full disk in between leaves neither. The folder above
    the checkpoint's must be there: where a mounted filesystem is gone, nothing is written into the place it left.
    Raises OSError that names the path and the free space; the room that the draft took is free again.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as draft, draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for what its file raised
            raise storage_error(error, path) from error


def log_batch(trainer: Trainer) -> None:
    """Log the batch now, from its `on_train_batch_end`, as is right before a checkpoint behind it.

    Lightning logs a batch after its callbacks: a kill in between would lose the row, since the run that goes on from
    the checkpoint does not make it again. The loggers leave out the second.
    """
    trainer._logger_connector.update_train_step_metrics()


def save(trainer: Trainer, path: Path) -> str | None:
    """Write a checkpoint; every rank calls it and is told the error of the first, if there is one."""
    error = None
    try:
        trainer.save_checkpoint(path)
    except OSError as failure:
        error = str(failure)
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks are
    error = trainer.strategy.broadcast(error)
    if error is not None and trainer.is_global_zero:
        log.warning("no checkpoint at step %d: %s", trainer.global_step, error)
    return error


def newest(folder: str | Path, without: Collection[str] = ()) -> Path | None:
    """The checkpoint of the most updates in the folder, but for those named; None where there is none.

    Times say nothing: clocks are put back, and the files of a copied folder are all new. Of equal ones that of an
    interruption is further.
    """
    files = [file for file in Path(folder).glob("*.ckpt") if file.name not in without]
    return max(files, key=lambda file: (num_updates(file), not file.name.startswith(STEP)), default=None)


def num_updates(file: Path) -> int:
    """Of a checkpoint: by its name, or by what it holds."""
    if file.name.startswith(STEP):
        return int(file.stem.removeprefix(STEP))
    return torch.load(file, mmap=True, weights_only=True)["global_step"]


class WindowCheckpoint(Checkpoint):
    """Checkpoints <dirpath>/step-00000120.ckpt every so many updates, or minutes, or both; and one at the end.

    Updates are counted over whole windows: where a window makes several, the first checkpoint behind a multiple is
    written. A time that is up inside a window waits for its end. So a checkpoint never has a half-used window of
    rollouts or a half-accumulated gradient in it.

    Kept are the `keep_last` newest; with `keep_every`, for ever, the first behind every multiple of that many updates;
    and with `monitor` the `keep_best` of the highest (or lowest) value of that metric, as it was logged last (a warning
    says once that it is not logged).
    A checkpoint that cannot be written is warned of and tried again when the next one is due; the older ones stay.
    After `max_failures` in a row the run ends with `RunStopped`. A run that ends because it learns nothing is saved
    behind its last batch. dirpath: by default <default_root_dir>/checkpoints.
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
        if faults := self._faults():
            raise ValueError(f"WindowCheckpoint: {'; '.join(faults)}")
        self.scores: dict[str, float] = {}  # by file name; known to rank 0, which writes the checkpoints
        self._failures = 0
        self._missed = False  # that `monitor` is not logged was warned of
        self._last_step = 0
        self._saved_batches = 0
        self._saved_at = 0.0

    def _faults(self) -> list[str]:
        faults = []
        for name in ("every_n_steps", "every_n_minutes", "keep_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                faults.append(f"{name}={value} must be greater than 0, or null")
        for name in ("keep_last", "keep_best", "max_failures"):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)} must be at least 1")
        if self.mode not in ("min", "max"):
            faults.append(f"mode={self.mode!r} must be 'min' or 'max'")
        return faults

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        if trainer.is_global_zero and stage == "fit":
            for draft in Path(self.dirpath).glob(f"*.ckpt{UNFINISHED}"):  # what a kill has left
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
        last, self._last_step = self._last_step, trainer.global_step
        due = self.every_n_steps and last // self.every_n_steps < trainer.global_step // self.every_n_steps
        if self.every_n_minutes and not getattr(pl_module, "window_is_open", False):
            # Clocks differ: the first rank's counts.
            due = trainer.strategy.broadcast(due or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)
        if due:
            log_batch(trainer)
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _num_batches(trainer) != self._saved_batches:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, IdleTooLong):  # its weights are sound, and all ranks are here
            log_batch(trainer)  # the row that shows it
            self.on_train_end(trainer, pl_module)

    def _save(self, trainer: Trainer) -> None:
        path = Path(self.dirpath) / f"{STEP}{trainer.global_step:08d}.ckpt"
        score = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        # A misspelt name would else keep nothing in silence. (What MIGBench logs, the first rank alone knows.)
        if self.monitor and score is None and not self._missed and trainer.is_global_zero:
            self._missed = True
            known = ", ".join(sorted(trainer.callback_metrics))
            words = "step %d has no score: monitor=%r is not logged so far; %s are"
            log.warning(words, trainer.global_step, self.monitor, known)
        if score is not None and not torch.isnan(score):
            self.scores[path.name] = float(score)
        error = save(trainer, path)
        self._saved_at = time.monotonic()
        if error is None:
            self._failures, self._saved_batches = 0, _num_batches(trainer)
            if trainer.is_global_zero:
                self._remove_old(trainer)
            return
        self.scores.pop(path.name, None)
        self._failures += 1
        if self._failures >= self.max_failures:
            raise RunStopped(
                f"stopped at step {trainer.global_step}: {self._failures} checkpoints in a row could not be written, "
                f"the last because {error}. The last good one is {newest(self.dirpath)}: the same command goes on there"
            )

    def _remove_old(self, trainer: Trainer) -> None:
        files = {num_updates(file): file for file in Path(self.dirpath).glob(f"{STEP}*.ckpt")}
        kept = set(sorted(files)[-self.keep_last :])
        if self.keep_every:
            marks = {step // self.keep_every: step for step in sorted(files, reverse=True)}  # the first behind each
            kept |= {step for mark, step in marks.items() if mark > 0}
        sign = 1 if self.mode == "max" else -1
        scored = [step for step, file in files.items() if file.name in self.scores]
        best = sorted(scored, key=lambda step: (-sign * self.scores[files[step].name], step))
        kept |= set(best[: self.keep_best])
        for step in files.keys() - kept:
            self.scores.pop(files[step].name, None)
            trainer.strategy.remove_checkpoint(files[step])


def _require_the_same(trainer: Trainer) -> None:
    """Raise RunStopped where this rank goes on from another checkpoint than the first one does, as where a file reads
    differently on another machine."""
    mine = Path(trainer.ckpt_path).name if trainer.ckpt_path else None
    first = trainer.strategy.broadcast(mine)
    if mine != first:
        raise RunStopped(f"rank {trainer.global_rank} goes on from {mine}, the first rank from {first}: start again")


def _num_batches(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready
