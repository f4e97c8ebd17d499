"""Show the progress of a run: a bar in a terminal, or a line every few seconds in a log file."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from datamodules.persistence.durations import in_words, left_text, stage_prefix
from datamodules.persistence.problems import Problems
from datamodules.persistence.progress_lines import EVERY_SECONDS, ProgressLines, has_terminal, needs_lines
from lightning_modules.training.optim import count_updates

# Metric -> its name and format in a line. From each group, the first metric that is logged is shown.
SHOWN = (
    {"reward/total": ("reward", ".3f"), "train/loss": ("loss", ".3f")},
    {"grpo/kl": ("KL", ".4f"), "train/token_accuracy": ("token accuracy", ".3f")},
    {"speed/completion_tokens_per_second": ("tokens/s", ",.0f")},
)


class Progress(ProgressBar):
    """Shows the step of all steps, loss or reward, KL, tokens per second, and the time that is left.

    The time left is the training time of this process, multiplied by the remaining steps and divided by the finished
    steps. It includes validation inside training. In a pipeline, the line also has the stage and the time left for all
    stages. Without a terminal there is a line before the first step and after the last one, too, because to load and
    to merge the weights of a large model takes minutes.

    Args:
        every_n_seconds: seconds between two lines if the output is not a terminal.
    """

    def __init__(self, every_n_seconds: float = EVERY_SECONDS) -> None:
        super().__init__()
        problems = Problems()
        problems.positive(every_n_seconds=every_n_seconds)
        problems.raise_all("Progress")
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._bar: tqdm | None = None
        self._lines: ProgressLines | None = None
        self._step_text = ""  # step and metrics, as of the last batch
        self._total = 0  # updates of the whole run
        self._set_up = self._began = self._seen = 0.0  # time of the setup, the first step, and the last `_look`
        self._first = self._done = 0.0  # finished share of the run when this process began, and now

    # Lightning's interface of a progress bar

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **_: Any) -> None:
        tqdm.write(" ".join(map(str, args)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to print lines."""
        self._set_up = time.monotonic()
        if self._is_shown(trainer) and needs_lines():
            self._lines = ProgressLines(self.line, self.every_n_seconds)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        if not self._is_shown(trainer):
            return
        self._total = count_updates(trainer, pl_module.accumulate, pl_module.updates_per_window)
        self._began = time.monotonic()
        self._look(trainer)
        self._first = self._done
        if self._lines is not None:
            self._lines.say()
        if has_terminal():
            self._bar = tqdm(total=self._total, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the bar, and note the text of the next line."""
        if not self._is_shown(trainer):
            return
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.set_postfix_str(metrics_text(trainer.callback_metrics), refresh=False)
        if time.monotonic() - self._seen >= 1:  # batches of a small model are shorter
            self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, and print the last line of training."""
        if self._bar is not None:
            self._bar.close()
        if self._lines is not None:
            self._look(trainer)
            self._lines.say()
            self._step_text = ""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print no more lines."""
        if self._lines is not None:
            self._lines.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print no more lines. Lightning does not call `teardown` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def line(self) -> str:
        """The line of this moment."""
        if not self._step_text:
            return f"{stage_prefix()}loading or saving, {in_words(time.monotonic() - self._set_up)} since the start"
        parts = [stage_prefix() + self._step_text]
        if self._first < self._done < 1:
            # The estimate is that of `_look`; the time since then has passed.
            left = (self._seen - self._began) * (1 - self._done) / (self._done - self._first)
            parts.append(left_text(max(0.0, left - (time.monotonic() - self._seen))))
        return ", ".join(parts)

    def _look(self, trainer: Trainer) -> None:
        """Note the step and the metrics. The lines are made in another thread, which must not read the Trainer."""
        self._seen, self._done = time.monotonic(), self.share_done(trainer)
        step, metrics = f"step {trainer.global_step} of {self._total}", metrics_text(trainer.callback_metrics)
        self._step_text = f"{step}, {metrics}" if metrics else step

    def share_done(self, trainer: Trainer) -> float:
        """Finished share of the run, from 0 to 1. It counts updates, or batches if their limit ends the run sooner."""
        shares = [trainer.global_step / max(1, self._total)]
        if trainer.max_epochs not in (None, -1) and trainer.num_training_batches != float("inf"):
            batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
            shares.append(batches / max(1, int(trainer.num_training_batches) * trainer.max_epochs))
        return min(1.0, max(shares))

    def _is_shown(self, trainer: Trainer) -> bool:
        return self._enabled and trainer.is_global_zero


def metrics_text(metrics: dict[str, Any]) -> str:
    """The metrics of a line: "reward 0.812, KL 0.0123, 1,840 tokens/s"."""
    parts = []
    for group in SHOWN:
        for name, (word, form) in group.items():
            if name in metrics:
                value = format(float(metrics[name]), form)
                parts.append(f"{value} {word}" if "/" in word else f"{word} {value}")
                break
    return ", ".join(parts)
