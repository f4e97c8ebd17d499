"""Loggers of metrics: a file of the attempt, and W&B. Both write a batch's row once, even if it is logged twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.persistence.files import append_text
from experiments.runs.metrics_csv import ATTEMPTS, ROWS

log = logging.getLogger(__name__)


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


class OnceWandbLogger(WandbLogger):
    """A batch may be logged before its checkpoint and again by Lightning; this logs it only once."""

    _last: Any = None

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._wandb_init.pop("anonymous", None)  # Lightning passes None, and W&B warns that the setting has no effect

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if (step, metrics) != self._last:
            self._last = step, dict(metrics)
            super().log_metrics(metrics, step)
