"""Measure the time of each training step, and the part of it in which the step waits for data."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.encoding.encoder import Batch


class Throughput(Callback):
    """Logs these metrics for every batch after the first:

    - speed/seconds_per_batch: wall-clock seconds from the end of the last batch to the end of this one.
    - speed/data_wait: the part of these seconds before the training step of this batch began.
    - speed/data_wait_share: the same as a fraction of speed/seconds_per_batch.
    - speed/prompt_tokens_per_second: prompt tokens of this rank's batch, divided by speed/seconds_per_batch. The
      LightningModule itself logs the speed of completions.

    List this callback last. The time that later callbacks need, and the time to write checkpoints, count as waiting.
    """

    def __init__(self) -> None:
        self._ended: float | None = None  # when the last batch ended
        self._started = 0.0  # when the training step of this batch began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the metrics of this batch."""
        last, self._ended = self._ended, time.perf_counter()
        if last is None:  # the first batch: its wait includes the start of the workers
            return
        seconds = self._ended - last
        pl_module.log_dict(
            {
                "speed/seconds_per_batch": seconds,
                "speed/data_wait": self._started - last,
                "speed/data_wait_share": (self._started - last) / seconds,
                "speed/prompt_tokens_per_second": sum(len(item.input_ids) for item in batch.items) / seconds,
            },
            batch_size=len(batch.items),
        )
