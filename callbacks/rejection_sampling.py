"""Rejection sampling: GRPO trains only on prompts that the loaded model solves sometimes (`prompt_selection`)."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.persistence.files import fingerprint, read_json
from datamodules.persistence.source_code import source_code
from datamodules.streaming.stream import UnusableData, smaller_batch
from lightning_modules.predictors.encode_ahead import prompt_encoder, rollout_engine
from lightning_modules.rl.prompt_selection import RejectionSettings, is_finished, rejection_key, rejection_sample

SOURCE = ("lightning_modules.rl.prompt_selection",)  # this module and all that it imports decide which prompts are kept


class RejectionSampling(Callback):
    """Before training, chooses prompts from the datamodule's shards, and replaces these shards by the chosen part.

    It runs in `setup`, for two reasons. The learning-rate schedule needs the number of batches, for which the Trainer
    opens the shards right after `setup`. And the policy is still the loaded model: a resumed run loads its checkpoint
    later, so the same choice can be made again if its files are gone.

    List this callback after those that check their paths in `setup`, because it may take hours.

    Args:
        folder: where the choice is written; by default <default_root_dir>/rejection_sampling.
        shared: a folder on the same filesystem. A finished choice is moved to <shared>/<its key>-<hash of the code>,
            and a choice that is there already is used. So the trials of a sweep sample only once, as long as the code
            that samples stays the same.
        settings: the fields of `RejectionSettings`.

    Raises in `setup`:
        RunStopped: no prompt is kept.
        UnusableData: fewer prompts are kept than one batch on every rank needs.
    """

    def __init__(self, folder: str | None = None, shared: str | None = None, **settings: Any) -> None:
        self.settings = RejectionSettings(**settings)
        self.folder, self.shared = folder, shared
        self.kept_share = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sample completions for all candidate prompts, choose, and point the datamodule to the chosen ones."""
        if stage != "fit":
            return
        # 1. Load the policy. Lightning does this the same way later, and then finds it loaded.
        with trainer.init_module():
            pl_module.configure_model()
        data, policy = trainer.datamodule, pl_module.policy.to(trainer.strategy.root_device)
        # 2. Settings that are not given are those of GRPO's own rollouts.
        folder = Path(self.folder or Path(trainer.default_root_dir) / "rejection_sampling")
        settings = replace(
            self.settings,
            temperature=self.settings.temperature or pl_module.rollout_settings.temperature,
            max_new_tokens=self.settings.max_new_tokens or pl_module.rollout_settings.max_new_tokens,
        )
        # 3. Use a shared choice if there is one. Rank 0 decides for all, because another run may be moving its choice
        # there at this moment.
        encoder = prompt_encoder(data.encoder)
        key = rejection_key(policy.processor_path, encoder, data.shards, settings) if self.shared else ""
        shared = Path(self.shared or "") / f"{key}-{fingerprint(source_code(SOURCE))[:8]}"
        if self.shared and trainer.strategy.broadcast(is_finished(shared, key)):
            folder = shared
        # 4. Sample and choose; a finished choice in `folder` is read, a partial one is completed.
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
            data.shard_reader,
        )
        # 5. Share a new choice with other runs.
        if self.shared and folder != shared:
            trainer.strategy.barrier("rejection_sampling")  # all ranks have read that the choice is finished
            if trainer.is_global_zero:
                _publish(folder, shared)
            trainer.strategy.barrier("rejection_sampling")  # the folder is at its new place
            folder = shared
            kept = folder / "shards"
        # 6. Train on the chosen prompts.
        data.shards = str(kept)
        histogram = read_json(folder / "histogram.json")
        self.kept_share = histogram["kept"] / histogram["candidates"]
        self._require_a_batch(histogram, data.batch_size, trainer.world_size)
        if trainer.is_global_zero:
            print(
                f"rejection sampling kept {histogram['kept']} of {histogram['candidates']} prompts: {kept}", flush=True
            )

    def _require_a_batch(self, histogram: Mapping[str, Any], batch_size: int, world_size: int) -> None:
        """Raise UnusableData if fewer prompts are kept than one batch of all ranks."""
        kept, needed = histogram["kept"], batch_size * world_size
        if kept < needed:
            raise UnusableData(
                f"rejection sampling kept {kept} of {histogram['candidates']} prompts, but data.batch_size="
                f"{batch_size} on {world_size} ranks needs {needed}. Use {smaller_batch(kept, world_size)}, more "
                f"prompts, or another threshold than {self.settings.threshold}"
            )

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """Length of the longest prompt with its completion, in tokens, for the rollout engine (`AsksEngine`)."""
        return max_prompt_tokens + (self.settings.max_new_tokens or max_new_tokens)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share of prompts that were kept."""
        for logger in trainer.loggers if trainer.ckpt_path is None else ():  # a resumed run has logged it before
            logger.log_metrics({"rejection_sampling/kept_share": self.kept_share}, step=0)


def _publish(folder: Path, shared: Path) -> None:
    """Move a finished choice to its shared place. If the same choice is there already, remove `folder` instead."""
    shared.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(shared)  # complete or not at all
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(folder)  # another run has made the same choice meanwhile
