"""Rule-based rewards (paper section 3.3): text and image sizes in, numbers out. No reward model is learned.

A reward is a weighted sum of terms. To add a term, write a function and name it in `REWARD_TERMS`. It is then logged as
`reward/<name>`, stands in the rollout log, and its weight can be set and swept as `model.reward_weights.<name>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datamodules.persistence.problems import Problems
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer
from datamodules.samples.scores import TextScore, score_text

if TYPE_CHECKING:
    from datamodules.encoding.encoder import EncodedSample
    from lightning_modules.rollouts.base import Rollout


def accuracy_term(text: str, score: TextScore) -> float:
    """r_acc: the IoU of the answer's box with the true one, 0-1; 0 where no box can be read."""
    return score.iou


def format_term(text: str, score: TextScore) -> float:
    """r_format: 1 for `<think>…</think><answer>…</answer>`, else 0."""
    return float(score.well_formed)


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward.

    Args:
        function: text of a completion and its score -> value of the term.
        weight: λ, unless the configuration sets another. With 0 the term is logged and does not count.
    """

    function: Callable[[str, TextScore], float]
    weight: float


REWARD_TERMS = {"accuracy": RewardTerm(accuracy_term, 1.0), "format": RewardTerm(format_term, 0.5)}


def term_weights(given: Mapping[str, float] | None = None) -> dict[str, float]:
    """λ of every term: the given one, or the term's own."""
    return {name: term.weight for name, term in REWARD_TERMS.items()} | dict(given or {})


def weight_problems(weights: Mapping[str, float]) -> Problems:
    """Problems of the weights that `term_weights` gives."""
    problems = Problems("reward_weights.")
    for name, weight in weights.items():
        known = ", ".join(REWARD_TERMS)
        problems.require(name in REWARD_TERMS, f": there is no such term; the terms are {known}", **{name: weight})
        problems.require(math.isfinite(weight), "must be a finite number", **{name: weight})
    if not any(weights.values()):
        problems.append(f"reward_weights={dict(weights)}: every reward would be 0")
    return problems


@dataclass(frozen=True)
class Reward:
    """The reward of one completion.

    `Reward(total=1.1, terms={"accuracy": 0.6, "format": 1.0}, failure=None)` is a well-formed answer whose box has IoU
    0.6.
    """

    total: float  # eq. 3: Σ weight · term
    terms: Mapping[str, float]  # every term of `REWARD_TERMS`, unweighted
    failure: str | None  # why no box could be read (a kind of `answer_text.ParseFailure`), else None

    def to_json(self) -> dict[str, Any]:
        return {"total": self.total, **self.terms, "failure": self.failure}


def reward(
    text: str,
    answer: BoxAnswer,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    weights: Mapping[str, float] | None = None,
) -> Reward:
    """Eq. 3 for one completion: r = λ_acc · IoU + λ_format · format.

    Args:
        text: the completion, without special tokens.
        answer: the true box.
        image_sizes: one entry for each image of the sample.
        box_format: how the model writes coordinates.
        weights: λ by the name of a term, as `term_weights` gives it; None: each term's own.

    Raises:
        ValueError: the errors of `score_text`.
    """
    score = score_text(text, answer, image_sizes, box_format)
    terms = {name: term.function(text, score) for name, term in REWARD_TERMS.items()}
    weights = term_weights() if weights is None else weights
    return Reward(sum(weights[name] * value for name, value in terms.items()), terms, score.failure)


def score_rollouts(
    items: Sequence[EncodedSample],
    rollouts: Sequence[Sequence[Rollout]],
    box_format: BoxFormat,
    weights: Mapping[str, float],
) -> list[list[Reward]]:
    """The reward of every completion: P lists of G.

    Args:
        items: the P prompts.
        rollouts: G completions of each prompt.
        box_format: how the model writes coordinates.
        weights: λ by the name of a term.

    Raises:
        ValueError: an answer that cannot be scored; names the sample.
    """
    rewards = []
    for item, group in zip(items, rollouts, strict=True):
        sample = item.sample
        try:
            rewards.append([reward(r.text, sample.answer, item.image_sizes, box_format, weights) for r in group])
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r} cannot be rewarded: {error}") from error
    return rewards
