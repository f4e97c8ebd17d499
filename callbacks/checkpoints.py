"""When checkpoints are written, and that they are whole or absent on every filesystem."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class WholeCheckpoints(TorchCheckpointIO):
    """Writes <path>.unfinished beside the checkpoint's place and renames it once it is on the disk.

    Lightning's own writes to the folder for temporary files and moves it from there: where that is another filesystem,
    the move is a copy onto the old checkpoint, and a kill or a full disk in between leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


class WindowCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose `every_n_train_steps` also holds where a window makes several updates.

    Lightning's own saves where the count of updates is a multiple, which then is seldom seen behind a batch; this one
    saves where it has passed one. Only the last batch of a window changes the count, so no window is open.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_step = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last_step = checkpoint["global_step"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last, self._last_step = self._last_step, trainer.global_step
        every = self._every_n_train_steps
        if every < 1 or last // every == trainer.global_step // every or self._should_skip_saving_checkpoint(trainer):
            return
        metrics = self._monitor_candidates(trainer)
        if self.monitor is not None and self.monitor not in metrics:
            self._defer_save_until_validation = True  # which logs it
            return
        self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)
