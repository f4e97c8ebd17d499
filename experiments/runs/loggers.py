"""Loggers of metrics: a file of the attempt, and W&B or TensorBoard. Each writes a batch's row once, even if it is
logged twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.persistence.files import append_text
from datamodules.persistence.user_error import UserError
from experiments.runs import metrics_csv
from experiments.runs.metrics_csv import ATTEMPTS, ROWS
from experiments.runs.wandb_runs import choose_wandb_mode, wandb_identity, wandb_run_id

log = logging.getLogger(__name__)

LogTo = Literal["wandb", "tensorboard", "csv"]


class LoggerMissing(UserError):
    """The package of a logger is not installed. The message has the cure."""


class MetricsLogger(Logger):
    """Appends {"step": 7, "grpo/kl": 0.01, …} to <folder>/attempts/<attempt>/metrics.jsonl, on the disk at once.

    Rows that cannot be written (the disk is full, the filesystem is gone) are kept in memory, in order, and training
    continues. If they still cannot be written when the run ends, OSError is raised. A kill or a full disk leaves no
    partial row in the middle of the file.
    """

    def __init__(self, folder: str | Path, attempt: int) -> None:
        super().__init__()
        self.file = Path(folder) / ATTEMPTS / str(attempt) / ROWS
        self._attempt = attempt
        self._last: dict[str, Any] = {}
        self._waiting: list[str] = []

    @property
    def name(self) -> str:
        return ATTEMPTS

    @property
    def version(self) -> int:
        return self._attempt

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the phase's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if row != self._last:
            self._last = row
            self._waiting.append(json.dumps(row) + "\n")
            self._write(at_any_cost=False)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write(at_any_cost=status == "success")

    def _write(self, at_any_cost: bool) -> None:
        if not self._waiting:
            return
        try:
            if self.file.parents[2].is_dir():  # otherwise the filesystem is gone; do not write to its empty mount point
                self.file.parent.mkdir(parents=True, exist_ok=True)
            append_text(self.file, "".join(self._waiting))
        except OSError as error:
            if at_any_cost:
                raise
            if len(self._waiting) == 1:
                log.warning("metrics wait in memory: %s", error)
        else:
            self._waiting = []


class _Once:
    """A batch may be logged before its checkpoint and again by Lightning; this logs it only once."""

    _last: Any = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if (step, metrics) != self._last:
            self._last = step, dict(metrics)
            super().log_metrics(metrics, step)


class OnceWandbLogger(_Once, WandbLogger):
    """W&B's logger, which logs a batch once."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._wandb_init.pop("anonymous", None)  # Lightning passes None, and W&B warns that the setting has no effect


class OnceTensorBoardLogger(_Once, TensorBoardLogger):
    """TensorBoard's logger, which logs a batch once."""


def make_loggers(folder: Path, key: str, log_to: LogTo) -> list[Logger]:
    """The loggers of a phase; metrics.jsonl of this attempt is always one of them.

    Args:
        folder: the phase folder.
        key: the key of the run.
        log_to: where else the metrics go; "csv": nowhere. W&B that is switched off in the environment is not asked.

    Raises LoggerMissing without the package of TensorBoard.
    """
    attempt = metrics_csv.next_attempt(folder)
    rows = MetricsLogger(folder, attempt)
    if log_to == "tensorboard":
        try:
            return [OnceTensorBoardLogger(folder, "tensorboard", str(attempt)), rows]
        except ModuleNotFoundError as error:
            raise LoggerMissing("log_to=tensorboard needs a package: pip install -e '.[tensorboard]'") from error
    if log_to == "csv" or choose_wandb_mode() == "disabled":
        return [rows]
    return [OnceWandbLogger(save_dir=str(folder), **wandb_identity(folder, wandb_run_id(folder, key))), rows]
