"""Samples that a phase cannot use: reported while it trains, and as a share of the data."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.encoding.encoder import Batch

log = logging.getLogger(__name__)


class RejectedSamples(Callback):
    """Logs `data/rejected_share`, and warns of rejected samples by rule: of the first one, then whenever they double.

    The share is that of the samples that all ranks have read in this epoch: a prompt that is too long, an answer that
    is not one box, a damaged image, and so on. It follows from the batch's place in the epoch alone, so a resumed run
    logs what an undisturbed one logs.
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
        if read:  # else the batch is not of this project's data
            pl_module.log("data/rejected_share", rejected / read, batch_size=len(batch))
