"""The reward of a run: a weighted sum of the rewards in a YAML list. Without a list, it is eq. 3 of the paper.

    rewards:
      - {class_path: lightning_modules.rl.rewards.box_rewards.IoU, weight: 1.0, name: accuracy}
      - {class_path: lightning_modules.rl.rewards.text_rewards.Format, weight: 0.5, name: format}

A reward is a function of one `Completion` that returns a number, or a class whose objects are called in the same way. A
class may define `score_batch(completions)` instead, which gets all completions of a step at once. A reward may have a
`range`, a pair of numbers; then a value outside is an error. docs/own_reward.md shows how to write one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.persistence.problems import Problems
from datamodules.persistence.user_error import UserError
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat
from lightning_modules.rl.rewards.completion import Completion, Failed
from lightning_modules.rl.rewards.reward_paths import brief, build, is_name, is_range

if TYPE_CHECKING:
    from datamodules.encoding.encoder import EncodedSample
    from lightning_modules.rollouts.base import Rollout

RewardEntry = Mapping[str, Any]  # the fields of `FIELDS`
Values = Sequence[float | Failed]


# Field of an entry -> its content. Only `class_path` is required. The default of `name` is the lower-case name of the
# class or function, and the default of `weight` (λ) is 1. With weight 0, a reward is only logged.
FIELDS = {"class_path": str, "init_args": Mapping, "weight": Real, "name": str}
PAPER: tuple[RewardEntry, ...] = (  # eq. 3
    {"class_path": "lightning_modules.rl.rewards.box_rewards.IoU", "weight": 1.0, "name": "accuracy"},
    {"class_path": "lightning_modules.rl.rewards.text_rewards.Format", "weight": 0.5, "name": "format"},
)


# The largest value and weighted sum, positive or negative. Sums over a window, squares of differences inside a group,
# and advantages as float32 stay finite.
LARGEST = 1e30
RIGHT_IOU = 0.5  # a completion is right if its IoU is above it, as in the benchmark


class RewardError(UserError, ValueError):
    """A reward raised an error or returned an invalid value. The message names the reward and the sample."""


@dataclass(frozen=True)
class Reward:
    """The reward of one completion.

    `Reward(total=1.1, terms={"accuracy": 0.6, "format": 1.0}, failure=None)` is a well-formed answer whose box has IoU
    0.6.
    """

    total: float  # Σ weight · term; 0 in a group that is left out
    terms: Mapping[str, float | None]  # every reward by name, unweighted; None if it failed without a value
    failure: str | None  # the reason if no box could be read (a kind of `answer_text.ParseFailure`), otherwise None
    iou: float = 0.0  # 0-1; of several boxes, the mean over the best pairing
    well_formed: bool = False  # it has the format (eq. 3)
    is_right: bool = False  # the IoU is above 0.5; of several boxes: F1 at this IoU is 1
    failed: tuple[str, ...] = ()  # names of the rewards that could not judge the completion
    left_out: bool = False  # its group has no rewards, because one of them failed, and is not trained on

    def to_json(self) -> dict[str, Any]:
        more = {"failed": list(self.failed)} if self.failed else {}
        more |= {"left_out": True} if self.left_out else {}
        return {"total": self.total, **self.terms, "failure": self.failure, **more}


@dataclass(frozen=True)
class Term:
    """One reward of the list."""

    name: str
    weight: float
    class_path: str
    reward: Callable[[Completion], float | Failed]

    def values(self, completions: Sequence[Completion]) -> Values:
        """The checked value of each completion.

        Raises:
            RewardError: the reward raised an error, or returned something other than a number in its range.
        """
        together = getattr(self.reward, "score_batch", None)
        if together is None:
            return [
                self._checked(self._call(self.reward, completion, completion), completion) for completion in completions
            ]
        if not completions:
            return []
        found = self._call(together, completions, completions[0])
        # The items of a mapping or a set are no values in the order of the completions.
        if not isinstance(found, Iterable) or isinstance(found, Mapping | Set | str | bytes | bytearray):
            kind = f"it must return a list of numbers, one for each completion, not {type(found).__name__}"
            raise self.error(f"returned {brief(found)} from score_batch; {kind}", completions[0])
        found = self._call(list, found, completions[0])  # of a generator, this runs the user's code
        if len(found) != len(completions):
            raise self.error(f"score_batch gave {len(found)} values for {len(completions)} completions", completions[0])
        return [self._checked(value, completion) for value, completion in zip(found, completions, strict=True)]

    def _call(self, function: Callable[[Any], Any], argument: Any, completion: Completion) -> Any:
        try:
            return function(argument)
        except UserError:  # its message has the fix
            raise
        except Exception as error:
            # the frame of the reward, not of functions that it calls; None for a function in C
            place = error.__traceback__.tb_next
            where = f" at {Path(place.tb_frame.f_code.co_filename).name}, line {place.tb_lineno}" if place else ""
            raise self.error(f"raised {type(error).__name__}: {brief(error)}{where}", completion) from error

    def _checked(self, value: Any, completion: Completion) -> float | Failed:
        if isinstance(value, Failed) and not isinstance(value.value, Failed):
            return value if value.value is None else Failed(self._checked(value.value, completion))
        if not isinstance(value, Real):
            shown = f"{brief(repr(value))}, of type {type(value).__name__}"
            raise self.error(f"returned {shown}; it must return a number", completion)
        stated = getattr(self.reward, "range", None)
        if stated is not None and not is_range(stated):  # set by the reward after its construction
            raise self.error(f"has range={stated!r:.60}; it must be two numbers, the lower one first", completion)
        low, high = stated or (-math.inf, math.inf)
        if not (abs(value) < math.inf and low <= value <= high):  # false for NaN, so NaN is outside every range
            wanted = f"a finite number in its range, {low:g} to {high:g}" if stated else "a finite number"
            raise self.error(f"returned {brief(value)}; it must return {wanted}", completion)
        if abs(value) > LARGEST:
            wanted = f"a number from {-LARGEST:g} to {LARGEST:g}"
            raise self.error(f"returned {brief(value)}; it must return {wanted}", completion)
        return float(value)

    def error(self, what: str, completion: Completion) -> RewardError:
        """The error of this reward for one completion; `what` follows the reward's name."""
        return RewardError(
            f"reward {self.name!r} ({self.class_path}) {what}\n"
            f"sample {completion.sample.id!r}, completion {completion.text[:120]!r}"
        )


class RewardList:
    """The rewards of a run; `problems` lists all problems of its settings.

    Args:
        entries: the list in the YAML; None means eq. 3: IoU plus 0.5 times the format.
        weights: λ by name; they override the weights in the list.
        max_new_tokens: length limit of the run's completions, for rewards that depend on it: their
            `length_faults(max_new_tokens)` lists the problems. None: no such check.
    """

    def __init__(
        self,
        entries: Sequence[RewardEntry] | None = None,
        weights: Mapping[str, float] | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self.problems = Problems()
        self.terms: list[Term] = []
        for index, entry in enumerate(PAPER if entries is None else entries):
            if faults := entry_faults(f"rewards[{index}]", entry):
                self.problems += faults
                continue
            built = build(f"rewards[{index}]", entry["class_path"], entry.get("init_args") or {}, self.problems)
            if max_new_tokens is not None and hasattr(built, "length_faults"):
                where = f"rewards[{index}].class_path={entry['class_path']!r}"
                self.problems += [f"{where}: {fault}" for fault in built.length_faults(max_new_tokens)]
            name = entry.get("name") or entry["class_path"].rpartition(".")[2].lower()
            weight = (weights or {}).get(name, 1.0 if entry.get("weight") is None else entry["weight"])
            self.terms.append(Term(name, weight, entry["class_path"], built))
        self._check(weights or {})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    def form_faults(self, form: AnswerForm) -> list[str]:
        """The rewards that cannot judge answers of this form: those whose `form_faults(form)` says so."""
        asked = ((term, getattr(term.reward, "form_faults", lambda _: ())) for term in self.terms)
        return [f"reward {term.name!r} ({term.class_path}) {fault}" for term, ask in asked for fault in ask(form)]

    @property
    def weights(self) -> dict[str, float]:
        """λ by name."""
        return {term.name: term.weight for term in self.terms}

    def _check(self, weights: Mapping[str, float]) -> None:
        problems, known = self.problems, ", ".join(self.names)
        rule = "is no name: letters, digits and _, but not total, failure, failed, left_out"
        for name in dict.fromkeys(self.names):
            problems.require(is_name(name), rule, **{"rewards.name": name})
            number = self.names.count(name)
            fault = f": {number} rewards have this name; give each its own with name: …"
            problems.require(number == 1, fault, **{"rewards.name": name})
        for name in weights:
            fault = f": there is no such reward; the rewards are {known}"
            problems.require(name in self.names, fault, **{f"reward_weights.{name}": weights[name]})
        for name, weight in self.weights.items():
            problems.require(math.isfinite(weight), "must be a finite number", **{f"rewards.{name}.weight": weight})
        if not any(self.weights.values()) and not problems:
            shown = f"with weights {self.weights}" if self.terms else "with no reward in the list"
            problems.append(f"rewards: every reward would be 0 {shown}; give one of them a weight")

    def score(
        self,
        items: Sequence[EncodedSample],
        rollouts: Sequence[Sequence[Rollout]],
        box_format: BoxFormat,
        max_tokens: int,
    ) -> list[list[Reward]]:
        """The reward of every completion: P lists of G rewards.

        Args:
            items: the P prompts.
            rollouts: G completions of each prompt.
            box_format: how the model writes coordinates.
            max_tokens: length limit of a completion.

        Raises:
            ValueError: an answer cannot be scored; the message names the sample.
            RewardError: a reward fails; the message names the reward and the sample.
        """
        return self.score_completions(
            [
                [
                    Completion(
                        item.sample,
                        item.image_sizes,
                        box_format,
                        rollout.text,
                        rollout.token_ids.tolist(),
                        "stop" if rollout.finished else "length",
                        max_tokens,
                        item.answer_form,
                    )
                    for rollout in group
                ]
                for item, group in zip(items, rollouts, strict=True)
            ]
        )

    def score_completions(self, groups: Sequence[Sequence[Completion]]) -> list[list[Reward]]:
        """Like `score`, for P lists of G completions."""
        flat = [completion for group in groups for completion in group]
        for completion in flat:
            try:
                completion.score  # noqa: B018 - parses the text, for the reward and for the counts of a step
            except ValueError as error:
                raise ValueError(f"sample {completion.sample.id!r} cannot be rewarded: {error}") from error
        # for each completion, one value per reward
        rows = zip(*[term.values(flat) for term in self.terms], strict=True)
        rewards = iter([self._reward(completion, row) for completion, row in zip(flat, rows, strict=True)])
        return [self._left_out_if_failed([next(rewards) for _ in group]) for group in groups]

    def _reward(self, completion: Completion, row: Sequence[float | Failed]) -> Reward:
        found = dict(zip(self.names, row, strict=True))
        failed = tuple(name for name, value in found.items() if isinstance(value, Failed))
        terms = {name: value.value if isinstance(value, Failed) else value for name, value in found.items()}
        total = self._total(completion, terms)
        score = completion.score
        right = score.is_right(RIGHT_IOU)
        return Reward(total, terms, score.failure, score.iou, score.well_formed, right, failed)

    def _total(self, completion: Completion, terms: Mapping[str, float | None]) -> float:
        """Σ weight · term. A sum that is not finite, or too large, is an error of the reward that adds most to it."""
        parts = {term.name: term.weight * (terms[term.name] or 0.0) for term in self.terms}
        total = sum(parts.values())
        if abs(total) <= LARGEST:  # false for NaN, the sum of both infinities
            return total
        largest = max(self.terms, key=lambda term: abs(parts[term.name]))
        raise largest.error(
            f"returned {terms[largest.name]:g}, which has weight {largest.weight:g}: the weighted sum of all rewards "
            f"is {total:g}, and must be from {-LARGEST:g} to {LARGEST:g}; lower the weight, or scale the reward",
            completion,
        )

    def _left_out_if_failed(self, group: list[Reward]) -> list[Reward]:
        """The group. If a reward failed without a value, all totals are equal, so that no completion has an advantage.

        A reward with weight 0 is only logged, so its failure changes nothing.
        """
        counting = [term.name for term in self.terms if term.weight != 0]
        if all(reward.terms[name] is not None for reward in group for name in counting):
            return group
        return [replace(reward, total=0.0, left_out=True) for reward in group]


def entry_faults(where: str, entry: RewardEntry) -> list[str]:
    """Problems of an entry's fields: unknown, missing, or of a wrong type."""
    faults = [] if entry.get("class_path") else [f"{where} has no class_path: write module.Class or module.function"]
    for name, value in entry.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            cure = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(FIELDS)}"
            faults.append(f"{where}.{name}={value!r:.60}: there is no such field; {cure}")
        elif value is not None and (not isinstance(value, FIELDS[name]) or isinstance(value, bool)):
            kind = {Mapping: "arguments by name", Real: "a number", str: "text"}[FIELDS[name]]
            faults.append(f"{where}.{name}={value!r:.60} must be {kind}")
    return faults
