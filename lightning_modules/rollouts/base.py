"""What every rollout engine is given and gives: prompts in, G completions of each prompt out.

`native/engine.py` samples in this process, `vllm/engine.py` on servers. Both are a `RolloutEngine`.

Shapes: P prompts, G completions of a prompt, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from datamodules.persistence.problems import Problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from datamodules.encoding.encoder import EncodedSample
    from lightning_modules.models.token_bans import Ban


@dataclass(frozen=True)
class SamplingSettings:
    """How many completions are sampled of each prompt, and from which distribution.

    Args:
        group_size: completions of each prompt, G.
        temperature: logits are divided by it before the softmax.
        max_new_tokens: length limit of a completion, its end token included.
        prompts_per_batch: how many prompts are decoded at the same time. When all completions of a prompt have ended,
            the next waiting prompt takes its slot (continuous batching).
    """

    group_size: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 1024
    prompts_per_batch: int = 32

    part: ClassVar[str] = "sampling"  # stands before a field's name in errors

    def problems(self) -> Problems:
        """All settings that cannot work, in words."""
        problems = Problems(f"{self.part}.")
        problems.positive(group_size=self.group_size, temperature=self.temperature)
        problems.positive(max_new_tokens=self.max_new_tokens, prompts_per_batch=self.prompts_per_batch)
        return problems

    def __post_init__(self) -> None:
        self.problems().raise_all(self.part)


@dataclass(frozen=True)
class RolloutRequest:
    """One call of an engine.

    Args:
        items: the P encoded prompts, on the policy's device.
        sampling: group size, temperature and limits.
        features: image features of each item, [image tokens, D], where they are encoded already. An engine that
            encodes images itself does not read them.
        seeds: one for each item. An item samples with random numbers that follow from its own seed alone, so its
            completions depend neither on the other items of the request nor on the process that samples them.
        generator: draws the seeds where `seeds` is None.
        greedy: take the likeliest token. Log-probabilities are still those at `sampling.temperature`.
        ban: tokens that are never written (`QwenVL.banned_ids`). Training bans all special tokens but the ends: a
            policy that writes an image placeholder changes its own prompt. Evaluation bans the placeholders alone.

    Raises:
        ValueError: `greedy` with a group of several completions, which would all be equal.
    """

    items: Sequence[EncodedSample]
    sampling: SamplingSettings
    features: Sequence[Tensor] | None = None
    seeds: Sequence[int] | None = None
    generator: torch.Generator | None = None
    greedy: bool = False
    ban: Ban = "special"

    def __post_init__(self) -> None:
        if self.greedy and self.sampling.group_size > 1:
            size = self.sampling.group_size
            raise ValueError(f"rollouts: greedy={self.greedy} gives {size} equal completions; set group_size=1")

    @classmethod
    def for_evaluation(
        cls, items: Sequence[EncodedSample], max_new_tokens: int, prompts_per_batch: int
    ) -> RolloutRequest:
        """One greedy answer to each item. It may hold every special token but a placeholder, as any model's may."""
        sampling = SamplingSettings(1, 1.0, max_new_tokens, prompts_per_batch)
        return cls(items, sampling, greedy=True, ban="placeholders")


@dataclass(frozen=True)
class Rollout:
    """One completion."""

    token_ids: Tensor  # [T] on the CPU, with the end token
    log_probs: Tensor  # [T] on the CPU, float32: of the distribution that was sampled from (tempered, without bans)
    finished: bool  # False if it was cut at the length limit: then no end token closes it
    text: str  # without special tokens


class RolloutEngine(Protocol):
    """Samples completions from the policy."""

    def generate(self, request: RolloutRequest) -> list[list[Rollout]]:
        """G rollouts of each item, in the order of `request.items`: P lists of G."""

    def sync(self) -> None:
        """The policy's weights have changed. Called on every rank, after the same update."""

    def close(self) -> None:
        """Nothing more will be sampled."""


@runtime_checkable
class AsksEngine(Protocol):
    """A callback that has the module's engine answer prompts of its own."""

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """The largest number of tokens that a prompt and its completion have together; 0 if it asks nothing.

        Args:
            max_prompt_tokens: limit of training; a limit of the callback's own replaces it.
            max_new_tokens: the same, of a completion.
        """
