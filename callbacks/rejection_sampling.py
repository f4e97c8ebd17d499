"""Rejection sampling: GRPO trains on the prompts that the stage-1 model solves sometimes (`prompt_selection`)."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.persistence.files import fingerprint, read_json
from datamodules.persistence.source_code import source_code
from lightning_modules.predictors.encode_ahead import prompt_encoder, rollout_engine
from lightning_modules.rl.prompt_selection import RejectionSettings, is_finished, rejection_key, rejection_sample

SOURCE = ("lightning_modules.rl.prompt_selection",)  # with all that it imports: what samples and chooses


class RejectionSampling(Callback):
    """Before training, puts the kept part of the datamodule's shards in the place of the whole.

    It runs in setup: before the optimizer's schedule asks how many batches there are, for which the Trainer opens the
    shards and keeps them. The policy is the stage-1 model there, in a resumed run too, whose checkpoint is loaded
    later; so a choice that is gone is made again, the same. List it behind callbacks that check their paths in setup:
    it may take hours. Candidates are the shards that the datamodule names; `folder` is by default
    <default_root_dir>/rejection_sampling. With `shared`, a folder on the same filesystem, a finished choice moves to
    <shared>/<its key>-<code>, and a choice that is already there is used. So the trials of a sweep sample once, not
    each for itself, as long as the source files that sample are the same.
    The other fields: `RejectionSettings`.
    """

    def __init__(self, folder: str | None = None, shared: str | None = None, **settings: Any) -> None:
        self.settings = RejectionSettings(**settings)
        self.folder, self.shared = folder, shared
        self.kept_share = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        with trainer.init_module():  # as Lightning does, which finds the weights there when its turn comes
            pl_module.configure_model()
        data, policy = trainer.datamodule, pl_module.policy.to(trainer.strategy.root_device)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "rejection_sampling")
        settings = replace(
            self.settings,
            temperature=self.settings.temperature or pl_module.temperature,
            max_new_tokens=self.settings.max_new_tokens or pl_module.max_new_tokens,
        )
        encoder = prompt_encoder(data.encoder)
        key = rejection_key(policy.processor_path, encoder, data.shards, settings) if self.shared else ""
        shared = Path(self.shared or "") / f"{key}-{fingerprint(source_code(SOURCE))[:8]}"
        # One process looks for all: another run may be moving its choice there at this moment.
        if self.shared and trainer.strategy.broadcast(is_finished(shared, key)):
            folder = shared
        kept = rejection_sample(
            policy,
            rollout_engine(pl_module),
            encoder,
            data.shards,
            settings,
            folder,
            trainer.global_rank,
            trainer.world_size,
            trainer.strategy.barrier,
            data.verify_shards,
        )
        if self.shared and folder != shared:
            trainer.strategy.barrier("rejection_sampling")  # the others have seen that the folder is finished
            if trainer.is_global_zero:
                _publish(folder, shared)
            trainer.strategy.barrier("rejection_sampling")
            folder = shared
            kept = folder / "shards"
        data.shards = str(kept)
        histogram = read_json(folder / "histogram.json")
        self.kept_share = histogram["kept"] / histogram["candidates"]
        if trainer.is_global_zero:
            print(
                f"rejection sampling kept {histogram['kept']} of {histogram['candidates']} prompts: {kept}", flush=True
            )

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """Of a prompt with its completion, in tokens (`AsksEngine`)."""
        return max_prompt_tokens + (self.settings.max_new_tokens or max_new_tokens)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers if trainer.ckpt_path is None else ():  # a resumed run has logged it
            logger.log_metrics({"rejection_sampling/kept_share": self.kept_share}, step=0)


def _publish(folder: Path, shared: Path) -> None:
    """Move a finished choice to its shared place, whole or not at all; where the same one is there, that one stays."""
    shared.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(shared)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(folder)  # another process has made the same one meanwhile
