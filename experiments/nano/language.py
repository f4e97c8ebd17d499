"""Stage 2 of the nano base: the language model learns to ground, list and describe what the frozen tower sees.

Each picture is followed by several questions, side by side (`packed_rows`): they see the picture and not each other,
so the picture is computed once for all of them. Only answers count in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from datamodules.checkpoints.pretrained import load_processor
from experiments.nano.drawing_tasks import Picture, PictureEncoder, accuracy
from experiments.nano.loop import share_of
from experiments.nano.settings import BaseSettings
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.qwen_vl import QwenVL


class LanguageStage:
    name: ClassVar[str] = "language"

    def __init__(self, settings: BaseSettings, folder: Path) -> None:
        self.settings = settings
        self.policy = QwenVL(str(folder))
        self.heads = nn.ModuleList()
        self.encoder = PictureEncoder(load_processor(folder), settings.grounding_turns)
        self.num_steps, self.learning_rate = settings.language_steps, settings.language_learning_rate

    def batches(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[list[Picture]]:
        for batch in range(start, self.num_steps):
            yield [
                self.encoder.picture(f"train:{self.settings.seed}", index)
                for index in share_of(batch, self.settings.language_batch, rank, world_size)
            ]

    def loss(self, batch: list[Picture]) -> tuple[float, int]:
        """Negative log-likelihood of all answer tokens of a batch, and how many they are."""
        items = [picture.item for picture in batch]
        features = self.policy.encode_images(items)
        marks = torch.cat([picture.is_answer for picture in batch])
        total, seen = 0.0, 0
        for rows in pack_rows(items, [picture.completions for picture in batch], self.settings.max_tokens_per_row):
            scores = self.policy.token_log_probs(rows, features, ban_tokens=False)
            chosen = marks[seen : seen + len(scores)]
            seen += len(scores)
            loss = -(scores * chosen).sum()
            loss.backward()
            total += loss.item()
        return total, int(marks.sum())

    def evaluate(self, num_eval: int) -> dict[str, float]:
        return accuracy(self.policy, self.encoder, num_eval)
