"""The trained policy as a plain model folder, for the next phase and for any server."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import SafetensorError

from callbacks.checkpoints import RunStopped
from datamodules.persistence.files import storage_error


class MergeAdapter(Callback):
    """When fitting has ended, saves the policy with its adapter merged into a copy, whole or not at all.

    `folder` is by default <default_root_dir>/merged. It comes after a finished run that is started again, too. Where it
    cannot be written, every rank ends with `RunStopped`; the same command goes on from the last checkpoint, that of
    the training's end unless that could not be written either. Where training has changed nothing, every rank ends with
    `NothingLearnt`, and nothing is written: what would be merged is the model that the phase started from.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.require_learnt()
        error = None
        folder = Path(self.folder or Path(trainer.default_root_dir) / "merged")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            pl_module.policy.save_merged(folder, write=trainer.is_global_zero)
        except (OSError, SafetensorError) as failure:
            error = str(storage_error(failure, folder))
        error = trainer.strategy.broadcast(error)  # the ranks also wait here for the first
        if error is not None:
            raise RunStopped(f"the merged model: {error}. Make room; the same command goes on from the last checkpoint")
