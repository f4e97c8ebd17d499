"""Where the time of a training step goes."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.encoding.encoder import Batch


class Throughput(Callback):
    """Logs, for every batch after the first:

    speed/seconds_per_batch: wall clock from the end of the last batch to the end of this one.
    speed/data_wait: the part of it, in seconds, before this batch's training step began.
    speed/data_wait_share: the same as a share of it (0-1).
    speed/prompt_tokens_per_second: prompt tokens of this rank's batch over it. (Completions: the module's own speed/*.)

    Callbacks listed behind it, and the writing of checkpoints, count as waiting: list it last.
    """

    def __init__(self) -> None:
        self._ended: float | None = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        last, self._ended = self._ended, time.perf_counter()
        if last is None:
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
