"""The trained policy as a plain model folder, for the next phase and for any server."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class MergeAdapter(Callback):
    """When fitting has ended, saves the policy with its adapter merged into a copy, whole or not at all.

    `folder` is by default <default_root_dir>/merged. It comes after a finished run that is started again, too.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(self.folder or Path(trainer.default_root_dir) / "merged")
        folder.parent.mkdir(parents=True, exist_ok=True)
        pl_module.policy.save_merged(folder, write=trainer.is_global_zero)
        trainer.strategy.barrier("merge_adapter")
