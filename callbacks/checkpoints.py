"""Checkpoints that are whole or absent on every filesystem."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


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
