"""Report the samples that a phase cannot use, and log their share of the data."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.encoding.encoder import Batch

log = logging.getLogger(__name__)


class RejectedSamples(Callback):
    """Logs `data/rejected_share`, and warns about rejected samples.

    For each rule it warns at the first sample, and each time their number doubles.

    The share is the number of rejected samples divided by the number of samples that all ranks have read in this epoch.
    A sample is rejected for a prompt that is too long, an answer that is not one box, a damaged image, and so on. The
    share depends only on the batch's position in the epoch, so a resumed run logs the same values as an uninterrupted
    run.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Report, and log the share up to this batch."""
        rejections = getattr(trainer.datamodule, "rejections", None)
        if rejections is not None and rejections.report_is_due():
            log.warning("rank %d so far: %s", trainer.global_rank, rejections.summary())

        counts = torch.tensor([batch.num_rejected, batch.num_read], dtype=torch.float64, device=pl_module.device)
        rejected, read = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if read:  # 0 for a batch from other data than this project's
            pl_module.log("data/rejected_share", rejected / read, batch_size=len(batch))
