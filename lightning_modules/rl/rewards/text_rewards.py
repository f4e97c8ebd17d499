"""Rewards for the form of a text: format, length, and repetition. Each class documents its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from datamodules.persistence.problems import Problems
from lightning_modules.rl.rewards.completion import Completion


class Format:
    """r_format of eq. 3: 1 for `<think>…</think><answer>…</answer>` with a readable box, otherwise 0."""

    range = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        return float(completion.score.well_formed)


@dataclass(frozen=True)
class SoftOverlong:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13), -1 to 0.

    With L_max = `limit` and L_cache = `margin`: it is 0 up to L_max - L_cache tokens, then decreases linearly to -1 at
    L_max, and stays -1.

    Args:
        margin: L_cache, in tokens.
        limit: L_max, in tokens; null: `rollout.max_new_tokens`.
    """

    margin: int
    limit: int | None = None

    range: ClassVar = (-1.0, 0.0)

    def __post_init__(self) -> None:
        problems = Problems()
        problems.whole(1, margin=self.margin)
        if self.limit is not None:
            problems.whole(0, limit=self.limit)
            if not problems:
                problems.require(self.limit >= self.margin, "must be at least margin", limit=self.limit)
        problems.raise_all("SoftOverlong")

    def length_faults(self, max_new_tokens: int) -> list[str]:
        """Without a limit of its own, `max_new_tokens` is the limit, which is known only in a run."""
        problems, rule = Problems(), f"must be at most the limit, which is rollout.max_new_tokens={max_new_tokens}"
        problems.require(self.limit is not None or self.margin <= max_new_tokens, rule, margin=self.margin)
        return problems

    def __call__(self, completion: Completion) -> float:
        limit = completion.max_tokens if self.limit is None else self.limit
        return max(-1.0, min(0.0, (limit - self.margin - completion.num_tokens) / self.margin))


@dataclass(frozen=True)
class Length:
    """1 for a completion of `shortest` to `longest` tokens.

    Outside, it is the ratio of length and nearer limit, from 0 to 1: half of `shortest`, or twice `longest`, gets 0.5.

    Args:
        shortest, longest: in tokens, the end token included.

    Raises:
        ValueError: they are no whole numbers, or `shortest` is larger than `longest`.
    """

    shortest: int
    longest: int

    range: ClassVar = (0.0, 1.0)

    def __post_init__(self) -> None:
        problems = Problems()
        problems.whole(0, shortest=self.shortest)
        problems.whole(1, longest=self.longest)
        if not problems:
            problems.require(self.longest >= self.shortest, "must be at least shortest", longest=self.longest)
        problems.raise_all("Length")

    def length_faults(self, max_new_tokens: int) -> list[str]:
        """No completion of the run would be long enough."""
        problems, rule = Problems(), f"must be at most rollout.max_new_tokens={max_new_tokens}"
        problems.require(self.shortest <= max_new_tokens, rule, shortest=self.shortest)
        return problems

    def __call__(self, completion: Completion) -> float:
        length = completion.num_tokens
        if length < self.shortest:
            return length / self.shortest
        return 1.0 if length <= self.longest else self.longest / length


@dataclass(frozen=True)
class Repetition:
    """Minus the share of token n-grams that repeat an earlier n-gram of the completion, -1 to 0.

    Args:
        n: length of an n-gram in tokens. A completion of fewer tokens earns 0, since it has no n-gram.
    """

    n: int = 4

    range: ClassVar = (-1.0, 0.0)

    def __post_init__(self) -> None:
        problems = Problems()
        problems.whole(1, n=self.n)
        problems.raise_all("Repetition")

    def __call__(self, completion: Completion) -> float:
        ids = completion.token_ids
        grams = [tuple(ids[start : start + self.n]) for start in range(len(ids) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
