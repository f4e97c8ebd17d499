"""Stages 2 and 3 of the nano base model: the language model learns to ground, list and describe what the frozen tower
sees, first in single pictures, then in one of several pictures that the question names.

Several conversations follow each set of pictures side by side in one packed row (`packed_rows`). They attend to the
pictures and not to each other, so the pictures are computed once for all of them. Only answers count in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from datamodules.checkpoints.pretrained import load_processor
from experiments.nano.drawing_tasks import PictureEncoder, PictureSet, accuracy, named_picture_accuracy
from experiments.nano.loop import share_of
from experiments.nano.settings import PretrainSettings
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.qwen_vl import QwenVL


class LanguageStage:
    """Stage 2, single pictures (see `loop.Stage` for the interface)."""

    name: ClassVar[str] = "language"

    def __init__(self, settings: PretrainSettings, folder: Path) -> None:
        self.settings = settings
        self.policy = QwenVL(str(folder))  # with the vision tower frozen
        self.heads = nn.ModuleList()  # nothing is trained besides the policy
        self.encoder = PictureEncoder(load_processor(folder), settings.grounding_turns)
        self.num_steps, self.learning_rate = settings.language_steps, settings.language_learning_rate
        self.batch_size = settings.language_batch

    def example(self, index: int) -> PictureSet:
        """Training example `index`."""
        return self.encoder.picture(f"train:{self.settings.seed}", index)

    def batches(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[list[PictureSet]]:
        """This process's share of the examples of each batch."""
        for batch in range(start, self.num_steps):
            yield [self.example(index) for index in share_of(batch, self.batch_size, rank, world_size)]

    def loss(self, batch: list[PictureSet]) -> tuple[float, int]:
        """Add the gradient of a batch; returns the sum of -log p over its answer tokens, and their number."""
        items = [picture.item for picture in batch]
        features = self.policy.encode_images(items)
        marks = torch.cat([picture.is_answer for picture in batch])  # bool, one for each completion token of the batch
        total, seen = 0.0, 0
        # One backward pass for each packed row, so that only one row's activations are in memory.
        for rows in pack_rows(items, [picture.completions for picture in batch], self.settings.max_tokens_per_row):
            scores = self.policy.token_log_probs(rows, features, ban_tokens=False)  # [completion tokens of the row]
            chosen = marks[seen : seen + len(scores)]
            seen += len(scores)
            loss = -(scores * chosen).sum()
            loss.backward()
            total += loss.item()
        return total, int(marks.sum())

    def evaluate(self, num_eval: int) -> dict[str, float]:
        """Grounding accuracy on held-out pictures, in per cent."""
        return accuracy(self.policy, self.encoder, num_eval)


class InterleavedStage(LanguageStage):
    """Stage 3, several pictures."""

    name: ClassVar[str] = "interleaved"

    def __init__(self, settings: PretrainSettings, folder: Path) -> None:
        super().__init__(settings, folder)
        self.num_steps, self.learning_rate = settings.interleaved_steps, settings.interleaved_learning_rate
        self.batch_size = settings.interleaved_batch

    def example(self, index: int) -> PictureSet:
        """Training example `index`."""
        return self.encoder.interleaved(f"interleaved:{self.settings.seed}", index)

    def evaluate(self, num_eval: int) -> dict[str, float]:
        """Grounding accuracy on held-out single pictures, and on held-out sets where the question names the picture."""
        return super().evaluate(num_eval) | named_picture_accuracy(self.policy, self.encoder, num_eval)
