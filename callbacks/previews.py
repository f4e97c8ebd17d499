"""Draw pictures of the policy's answers during training and at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.mig_bench import MIGBench
from datamodules.benchmarks.base import limit_columns
from datamodules.metrics.drawing import PREVIEW_TEXTS, Drawn, describe_preview, draw_previews, preview_table
from datamodules.metrics.scoring import score_replies
from datamodules.persistence.files import make_folder, remove_draft, write_json
from datamodules.persistence.problems import Problems
from datamodules.samples.sample import Sample
from lightning_modules.predictors.encode_ahead import prompt_encoder, rollout_engine
from lightning_modules.predictors.policy import PolicyPredictor

log = logging.getLogger(__name__)


class Previews(MIGBench):
    """Asks `num_per_task` questions of each MIG-Bench task and draws the answers.

    It does so every `every_n_steps` updates, and once when training ends.

    PNG files go to <folder>/step_000100/<task>_<position>.png (by default <default_root_dir>/previews), their questions
    and answers to previews.json beside them. A W&B logger also gets them as the table "previews". Only rank 0 works. If
    a file cannot be written, a warning is logged.

    Args:
        annotations: path of MIG_data.json.
        image_root: the folder that contains "MIG-Bench/"; the image names in the file begin with "MIG-Bench/".
        num_per_task: number of questions of each task.
        settings: the other arguments of `BenchmarkEvaluation`, except `after`.
    """

    def __init__(self, annotations: str, image_root: str, num_per_task: int = 1, **settings: Any) -> None:
        problems = Problems()
        problems.positive(num_per_task=num_per_task)
        problems.raise_all("Previews")
        super().__init__(annotations, image_root, num_per_task, after=True, **settings)
        self.name = "previews"  # name of the folder, too

    def _evaluate(
        self, name: str, trainer: Trainer, pl_module: LightningModule, samples: Sequence[Sample], required: bool = False
    ) -> None:
        """Ask and draw; every rank calls this."""
        with pl_module.policy.gathered():
            if trainer.is_global_zero:
                self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        benchmark, encoder = self.benchmark, prompt_encoder(trainer.datamodule.encoder, self.max_prompt_tokens)
        samples = limit_columns(benchmark.samples, self.limit)
        predictor = PolicyPredictor(pl_module.policy, rollout_engine(pl_module), encoder, self.decoding)
        replies = {sample.id: reply for sample, reply in predictor.answers(samples, benchmark.load)}
        predictions = score_replies(benchmark, samples, replies, predictor.box_format, predictor.answer_form)
        rows = draw_previews(samples, predictions, benchmark.load, encoder.max_image_pixels)
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
    texts = []
    for sample, prediction, preview in rows:
        file = folder / f"{sample.task}_{sample.id.rpartition('/')[2]}.png"
        try:
            preview.save(file)
        except OSError:
            remove_draft(file)
            raise
        texts.append({"file": file.name} | describe_preview(sample, prediction))
    write_json(folder / PREVIEW_TEXTS, texts)
