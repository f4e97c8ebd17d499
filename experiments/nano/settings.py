"""The settings of the nano base model's pretraining."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """All settings that the resulting model depends on, except for rounding."""

    seed: int = 0
    # Sizes of the model: width and number of layers.
    text_width: int = 192
    text_depth: int = 4
    vision_width: int = 128
    vision_depth: int = 4
    # Stage 1: the vision tower.
    tower_pictures: int = 96_000
    tower_batch: int = 32  # number of pictures in a step
    tower_learning_rate: float = 3e-3
    # Stage 2: the language model.
    language_pictures: int = 32_000
    language_batch: int = 16
    language_learning_rate: float = 2e-3
    grounding_turns: int = 5  # number of grounding questions about one picture
    max_tokens_per_row: int = 4096  # length of a packed row
    # Stage 3: several pictures in a conversation.
    interleaved_sets: int = 38_400  # sets of pictures, a quarter of them single pictures as in stage 2; 0: no stage 3
    interleaved_batch: int = 16
    interleaved_learning_rate: float = 1.5e-3
    # All stages: the share of the steps in which the learning rate rises, and the share in which it falls to zero.
    warmup: float = 0.03
    decay: float = 0.4
    num_eval: int = 400  # number of pictures in the evaluation at the end of a stage

    @property
    def tower_steps(self) -> int:
        """Number of optimizer steps of stage 1."""
        return self.tower_pictures // self.tower_batch

    @property
    def language_steps(self) -> int:
        """Number of optimizer steps of stage 2."""
        return self.language_pictures // self.language_batch

    @property
    def interleaved_steps(self) -> int:
        """Number of optimizer steps of stage 3."""
        return self.interleaved_sets // self.interleaved_batch
