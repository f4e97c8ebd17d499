"""Pictures of the policy's answers, drawn while it trains and when fitting ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from datamodules.benchmarks import mig_bench
from datamodules.benchmarks.base import Benchmark, limit_columns
from datamodules.metrics.drawing import Drawn, draw_previews, preview_table
from datamodules.metrics.scoring import score_replies
from datamodules.persistence.files import make_folder, remove_draft
from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import Sample
from lightning_modules.predictors.base import Decoding
from lightning_modules.predictors.encode_ahead import prompt_encoder, rollout_engine
from lightning_modules.predictors.policy import PolicyPredictor

log = logging.getLogger(__name__)


class Previews(Callback):
    """Draws `num_per_task` questions of each MIG-Bench task when fitting ends, and every `every_n_steps` updates
    before.

    PNG files go to <folder>/step_000100/<task>_<position>.png (by default <default_root_dir>/previews); a W&B logger
    also gets them as the table "previews". Only the first rank works. Files that cannot be written are warned of.
    """

    def __init__(
        self,
        annotations: str,
        image_root: str,
        num_per_task: int = 1,
        every_n_steps: int | None = None,
        max_new_tokens: int = 1024,
        max_prompt_tokens: int | None = None,
        folder: str | None = None,
    ) -> None:
        self.annotations, self.image_root, self.folder = annotations, image_root, folder
        self.num_per_task, self.every_n_steps = num_per_task, every_n_steps
        self.decoding, self.max_prompt_tokens = Decoding(max_new_tokens), max_prompt_tokens
        problems = Problems()
        problems.positive(num_per_task=num_per_task)
        problems.positive_or_null(every_n_steps=every_n_steps, max_prompt_tokens=max_prompt_tokens)
        problems.raise_all("Previews")
        self.benchmark: Benchmark | None = None
        self.samples: tuple[Sample, ...] = ()
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        try:
            self.benchmark = mig_bench.load_files(self.annotations, self.image_root)
        except (OSError, ValueError) as error:
            raise UserError(f"Previews: {error}") from error
        self.samples = limit_columns(self.benchmark.samples, self.num_per_task)
        self._home(trainer).mkdir(parents=True, exist_ok=True)

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """The longest prompt with its completion, in tokens (`AsksEngine`)."""
        return (self.max_prompt_tokens or max_prompt_tokens) + self.decoding.max_new_tokens

    def _home(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "previews")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last, self._last_step = self._last_step, trainer.global_step
        if self.every_n_steps and last // self.every_n_steps < trainer.global_step // self.every_n_steps:
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.to(trainer.strategy.root_device)  # the strategy has taken it down to the CPU
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with pl_module.policy.gathered():
            if trainer.is_global_zero:
                self._draw_all(trainer, pl_module)

    def _draw_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        benchmark, encoder = self.benchmark, prompt_encoder(trainer.datamodule.encoder, self.max_prompt_tokens)
        predictor = PolicyPredictor(pl_module.policy, rollout_engine(pl_module), encoder, self.decoding)
        replies = {sample.id: reply for sample, reply in predictor.answers(self.samples, benchmark.load)}
        predictions = score_replies(benchmark, self.samples, replies, predictor.box_format)
        rows = draw_previews(self.samples, predictions, benchmark.load, encoder.max_image_pixels)
        folder = self._home(trainer) / f"step_{trainer.global_step:06d}"
        try:
            _save(rows, folder)
        except OSError as error:
            log.warning("the previews of step %d are not kept: %s", trainer.global_step, error)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                table = preview_table(rows)
                logger.log_table("previews", columns=table.columns, data=table.data)


def _save(rows: Sequence[Drawn], folder: Path) -> None:
    make_folder(folder)
    for sample, _, preview in rows:
        file = folder / f"{sample.task}_{sample.id.rpartition('/')[2]}.png"
        try:
            preview.save(file)
        except OSError:
            remove_draft(file)
            raise
