"""Pictures of what the policy answers: predicted and true box on the target image, with the text below."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont

from callbacks.encoding import prompt_encoder, rollout_engine
from callbacks.evaluation import EvaluationSettings, require_positive
from callbacks.mig_bench import evaluate_mig_bench, limit_tasks
from datamodules.benchmarks.mig_bench import load_images, load_mig_bench
from datamodules.images.image_loading import ImageError, load_image
from datamodules.metrics.mig_scoring import Prediction
from datamodules.persistence.files import make_folder, remove_draft
from datamodules.samples.boxes import Box, ImageSizes
from datamodules.samples.sample import BoxPart, LoadedSample, Sample, SampleError, TextPart

log = logging.getLogger(__name__)

WIDTH = 640  # pixels; every preview is as wide
FONT_SIZE = 14
LINE_HEIGHT = 18
TRUE_COLOUR, PREDICTED_COLOUR = "#00a000", "#e02020"


def draw_preview(image: Image.Image, sample: Sample, prediction: Prediction) -> Image.Image:
    """The target `image` with the true (green) and the predicted (red) box, above the question and the answer."""
    picture = image.convert("RGB").resize((WIDTH, max(1, round(image.height * WIDTH / image.width))))
    draw = ImageDraw.Draw(picture)
    for box, colour in ((prediction.truth, TRUE_COLOUR), (prediction.box, PREDICTED_COLOUR)):
        if box is not None:
            _draw_box(draw, box, colour, picture.size)
    question = "".join(part.text for part in sample.messages if isinstance(part, TextPart | BoxPart))
    result = f"no box: {prediction.failure}" if prediction.box is None else f"IoU {prediction.iou:.2f}"
    heading = f"{prediction.task} {prediction.id}, image {sample.answer.image + 1} of {len(sample.images)}, {result}"
    lines = [line for text in (heading, question, prediction.text) for line in textwrap.wrap(text, WIDTH // 8) or [""]]
    canvas = Image.new("RGB", (WIDTH, picture.height + LINE_HEIGHT * len(lines) + 8), "white")
    canvas.paste(picture)
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((4, picture.height + 4 + number * LINE_HEIGHT), line, "black", font)
    return canvas


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, colour: str, size: tuple[int, int]) -> None:
    """Outline a unit box that may be inverted or far outside: cut to the picture, sides put in order."""
    x1, y1, x2, y2 = ImageSizes(original=size, resized=size).to_pixels(box)
    xs = sorted(min(max(x, 0.0), size[0] - 1.0) for x in (x1, x2))
    ys = sorted(min(max(y, 0.0), size[1] - 1.0) for y in (y1, y2))
    draw.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=colour, width=3)


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
        self.settings, self.max_prompt_tokens = EvaluationSettings(max_new_tokens), max_prompt_tokens
        every = {"every_n_steps": every_n_steps, "max_prompt_tokens": max_prompt_tokens}
        require_positive("Previews", num_per_task=num_per_task, **every)
        self.samples: list[Sample] = []
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.samples = limit_tasks(load_mig_bench(self.annotations, self.image_root)[0], self.num_per_task)
        self._home(trainer).mkdir(parents=True, exist_ok=True)

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """Of a prompt with its completion, in tokens (`AsksEngine`)."""
        return (self.max_prompt_tokens or max_prompt_tokens) + self.settings.max_new_tokens

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
        encoder = prompt_encoder(trainer.datamodule.encoder, self.max_prompt_tokens)
        load = partial(load_images, image_root=self.image_root)
        engine = rollout_engine(pl_module)
        predictions = evaluate_mig_bench(
            pl_module.policy, engine, encoder, self.samples, load, self.settings, show_progress=False
        )
        folder = self._home(trainer) / f"step_{trainer.global_step:06d}"
        rows = draw_previews(self.samples, predictions, load, encoder.max_image_pixels)
        try:
            _save(rows, folder)
        except OSError as error:
            log.warning("the previews of step %d are not kept: %s", trainer.global_step, error)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                table = preview_table(rows)
                logger.log_table("previews", columns=table.columns, data=table.data)


def draw_previews(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    load: Callable[[Sample], LoadedSample],
    max_image_pixels: int,
) -> list[tuple[Sample, Prediction, Image.Image]]:
    """Each sample with its prediction and its preview; without those whose image cannot be read, of which the
    evaluation has warned."""
    rows = []
    for sample, prediction in zip(samples, predictions, strict=True):
        try:
            image = load_image(load(sample).images[sample.answer.image], max_image_pixels)
        except (ImageError, SampleError):
            continue
        rows.append((sample, prediction, draw_preview(image, sample, prediction)))
    return rows


def _save(rows: Sequence[tuple[Sample, Prediction, Image.Image]], folder: Path) -> None:
    make_folder(folder)
    for sample, _, preview in rows:
        file = folder / f"{sample.task}_{sample.id.rpartition('/')[2]}.png"
        try:
            preview.save(file)
        except OSError:
            remove_draft(file)
            raise


def preview_table(rows: Sequence[tuple[Sample, Prediction, Image.Image]]) -> Any:
    """A `wandb.Table` of the previews."""
    import wandb

    data = [[s.task, s.id, wandb.Image(preview), p.iou, p.text] for s, p, preview in rows]
    return wandb.Table(columns=["task", "id", "preview", "iou", "text"], data=data)
