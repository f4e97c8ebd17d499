"""Show the progress of a run: a bar in a terminal, or a line every few seconds in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from datamodules.persistence.durations import LATER_SECONDS, STAGE, in_words
from datamodules.persistence.problems import Problems
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
    steps. It includes validation inside training. In a pipeline, the environment variables of
    `datamodules.persistence.durations` add the stage and the time left for all stages.

    Args:
        every_n_seconds: seconds between two lines if the output is not a terminal.
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        problems = Problems()
        problems.positive(every_n_seconds=every_n_seconds)
        problems.raise_all("Progress")
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._bar: tqdm | None = None
        self._total = 0  # updates of the whole run
        self._began = self._last = 0.0  # time of the first step, and time of the last line
        self._first = 0.0  # share of the run that was finished before this process began

    # Lightning's interface of a progress bar

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **_: Any) -> None:
        tqdm.write(" ".join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        if not self._is_shown(trainer):
            return
        self._total = count_updates(trainer, pl_module.accumulate, pl_module.updates_per_window)
        self._began = self._last = time.monotonic()
        self._first = self.share_done(trainer)
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, initial=trainer.global_step, unit="step", dynamic_ncols=True)
        else:
            print(f"{stage_prefix()}training: step {trainer.global_step} of {self._total}", flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the bar, or print a line if it is time."""
        if not self._is_shown(trainer):
            return
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.set_postfix_str(metrics_text(trainer.callback_metrics), refresh=False)
        elif time.monotonic() - self._last >= self.every_n_seconds:
            self._last = time.monotonic()
            print(self.line(trainer), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._is_shown(trainer):
            print(self.line(trainer), flush=True)

    def line(self, trainer: Trainer) -> str:
        """The line of this moment."""
        parts = [f"{stage_prefix()}step {trainer.global_step} of {self._total}", metrics_text(trainer.callback_metrics)]
        spent, done = time.monotonic() - self._began, self.share_done(trainer)
        if self._first < done < 1:
            left = spent * (1 - done) / (done - self._first)
            parts.append(f"{in_words(left)} left")
            if later := os.environ.get(LATER_SECONDS):
                parts.append(f"of all stages {in_words(left + float(later))}")
        return ", ".join(part for part in parts if part)

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


def stage_prefix() -> str:
    """ "[2 of 5, cot_sft: training] " in a stage of a pipeline, else ""."""
    stage = os.environ.get(STAGE)
    return f"[{stage}] " if stage else ""
