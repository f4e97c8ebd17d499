"""The interface of rollout engines: prompts in, G completions of each prompt out.

`native/engine.py` samples in this process, `vllm/engine.py` on servers. Both are a `RolloutEngine`.

Shapes: P prompts, G completions of a prompt, T tokens of a completion, F width of an image feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Number of completions per prompt, and their sampling distribution.

    Args:
        group_size: G, number of completions of each prompt.
        temperature: logits are divided by it before the softmax.
        max_new_tokens: length limit of a completion, including its end token.
        prompts_per_batch: number of prompts whose completions have memory at full length. When completions have ended,
            waiting prompts take their places (continuous batching). On a GPU a prompt waits until all completions of
            another one have ended. On a CPU it begins as soon as there is memory, so that at most twice this number of
            prompts is decoded at the same time.
    """

    group_size: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 1024
    prompts_per_batch: int = 32

    part: ClassVar[str] = "sampling"  # prefix of field names in errors

    def problems(self) -> Problems:
        """Messages for all invalid settings."""
        problems = Problems(f"{self.part}.")
        problems.positive(group_size=self.group_size, temperature=self.temperature)
        problems.positive(max_new_tokens=self.max_new_tokens, prompts_per_batch=self.prompts_per_batch)
        return problems

    def __post_init__(self) -> None:
        self.problems().raise_all(self.part)


@dataclass(frozen=True)
class RolloutRequest:
    """The arguments of one call of an engine.

    Args:
        items: the P encoded prompts, on the policy's device.
        sampling: group size, temperature and limits.
        features: image features of each item, [image tokens, F], if they are encoded already. An engine that encodes
            images itself ignores them.
        seeds: one seed for each item. The random numbers of an item depend only on its seed, so its completions depend
            neither on other items nor on the process.
        generator: draws the seeds if `seeds` is None.
        greedy: take the most likely token. Log-probabilities still refer to `sampling.temperature`.
        ban: tokens that are never sampled (`QwenVL.banned_ids`). Training bans all special tokens except end tokens,
            because an image placeholder in a completion would count as an image of the prompt. Evaluation bans only the
            placeholders.
        watch: called while the only completion of the only prompt is decoded, with its token ids so far. An error that
            it raises ends the call. An engine on servers ignores it.

    Raises:
        ValueError: `greedy` is set for a group of several completions, which would all be equal, or `watch` for several
            completions.
    """

    items: Sequence[EncodedSample]
    sampling: SamplingSettings
    features: Sequence[Tensor] | None = None
    seeds: Sequence[int] | None = None
    generator: torch.Generator | None = None
    greedy: bool = False
    ban: Ban = "special"
    watch: Callable[[list[int]], None] | None = None

    def __post_init__(self) -> None:
        if self.greedy and self.sampling.group_size > 1:
            size = self.sampling.group_size
            raise ValueError(f"rollouts: greedy={self.greedy} gives {size} equal completions; set group_size=1")
        if self.watch is not None and len(self.items) * self.sampling.group_size > 1:
            raise ValueError(f"rollouts: watch is for one completion, not {len(self.items) * self.sampling.group_size}")

    @classmethod
    def for_evaluation(
        cls,
        items: Sequence[EncodedSample],
        max_new_tokens: int,
        prompts_per_batch: int,
        watch: Callable[[list[int]], None] | None = None,
    ) -> RolloutRequest:
        """The request for one greedy answer per item. All special tokens except placeholders are allowed."""
        sampling = SamplingSettings(1, 1.0, max_new_tokens, prompts_per_batch)
        return cls(items, sampling, greedy=True, ban="placeholders", watch=watch)


@dataclass(frozen=True)
class Rollout:
    """One completion."""

    token_ids: Tensor  # [T] on the CPU, with the end token
    # [T] on the CPU, float32, under the sampling distribution (with temperature, without banned tokens)
    log_probs: Tensor
    finished: bool  # False if it was cut at the length limit; then it has no end token
    text: str  # without special tokens


class RolloutEngine(Protocol):
    """Samples completions from the policy."""

    def generate(self, request: RolloutRequest) -> list[list[Rollout]]:
        """G rollouts of each item, in the order of `request.items`: P lists of G rollouts."""

    def sync(self) -> None:
        """Tell the engine that the policy's weights have changed. Called on every rank, after the same update."""

    def close(self) -> None:
        """Tell the engine that nothing more will be sampled."""


@runtime_checkable
class AsksEngine(Protocol):
    """A callback that uses the module's engine for its own prompts."""

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """The largest number of tokens of a prompt with its completion; 0 if the callback asks nothing.

        Args:
            max_prompt_tokens: limit in training; a limit of the callback itself replaces it.
            max_new_tokens: the same for a completion.
        """
