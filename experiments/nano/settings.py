"""Settings of the nano base."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseSettings:
    """Everything that decides what comes out, but for rounding."""

    seed: int = 0
    text_width: int = 192
    text_depth: int = 4
    vision_width: int = 128
    vision_depth: int = 4
    # Stage 1: the vision tower.
    tower_pictures: int = 96_000
    tower_batch: int = 32
    tower_learning_rate: float = 3e-3
    # Stage 2: the language model.
    language_pictures: int = 32_000
    language_batch: int = 16
    language_learning_rate: float = 2e-3
    grounding_turns: int = 5
    max_tokens_per_row: int = 4096
    # Both: shares of a stage in which the learning rate rises, and falls to zero at the end.
    warmup: float = 0.03
    decay: float = 0.4
    num_eval: int = 400

    @property
    def tower_steps(self) -> int:
        return self.tower_pictures // self.tower_batch

    @property
    def language_steps(self) -> int:
        return self.language_pictures // self.language_batch
