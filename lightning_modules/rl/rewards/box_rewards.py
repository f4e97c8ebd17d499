"""Rewards for the box of an answer. Each class documents its range; a text without a box gets the lowest value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from datamodules.persistence.problems import Problems, is_number
from datamodules.samples.answer_text import AnswerForm
from lightning_modules.rl.rewards.box_overlaps import LOWEST, OverlapKind, overlap
from lightning_modules.rl.rewards.completion import Completion

Measure = Literal["f1", "precision", "recall"]


class IoU:
    """r_acc of eq. 3: the IoU of the answer's box with the true box, 0 to 1; 0 if no box can be read.

    With named images: the mean IoU of the best pairing of written and true boxes, where a box without a partner counts
    0 (`BoxMatching.mean_iou`).
    """

    range = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        return completion.score.iou


@dataclass(frozen=True)
class IoUAbove:
    """1 if the IoU is above `threshold`, otherwise 0. Benchmarks count an answer with an IoU above 0.5 as right.

    With named images: 1 if this holds of a partner for every true box, and no other box is written.
    """

    threshold: float = 0.5

    range: ClassVar = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_threshold(self)

    def __call__(self, completion: Completion) -> float:
        return float(completion.score.is_right(self.threshold))


class _Overlap:
    """An overlap that also distinguishes near misses from far misses (`box_overlaps`)."""

    kind: ClassVar[OverlapKind]
    range: ClassVar[tuple[float, float]]

    def form_faults(self, form: AnswerForm) -> list[str]:
        """It cannot judge answers of several boxes."""
        cure = f"data.answer_form={form} needs IoU, IoUAbove, RightImage or BoxMatch"
        return [] if form == AnswerForm.ONE_BOX else [f"compares one box with one: {cure}"]

    def __call__(self, completion: Completion) -> float:
        if faults := self.form_faults(completion.answer_form):
            raise ValueError(f"{type(self).__name__} {faults[0]}")
        box, answer = completion.score.box, completion.sample.answer
        return self.range[0] if box is None else overlap(self.kind, box, answer.box)


class GIoU(_Overlap):
    """Generalized IoU (Rezatofighi et al., arXiv:1902.09630), -1 to 1; -1 if no box can be read. One-box form only."""

    kind, range = "giou", (LOWEST["giou"], 1.0)


class DIoU(_Overlap):
    """Distance IoU (Zheng et al., arXiv:1911.08287), -1 to 1; -1 if no box can be read. One-box form only."""

    kind, range = "diou", (LOWEST["diou"], 1.0)


class CIoU(_Overlap):
    """Complete IoU (Zheng et al., arXiv:1911.08287), -1.5 to 1; -1.5 if no box can be read. One-box form only."""

    kind, range = "ciou", (LOWEST["ciou"], 1.0)


class RightImage:
    """1 if the answer names (by `"image": k`) exactly the images of the true boxes, otherwise 0."""

    range = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        named = set(completion.named_images)
        return float(bool(named) and named == {true.image for true in completion.true_boxes})


@dataclass(frozen=True)
class BoxMatch:
    """The agreement of all boxes with the true boxes, in number and position, 0 to 1; 0 without a box.

    The written and the true boxes are matched so that the number of pairs with an IoU above `threshold` is largest.
    precision = pairs / written boxes, recall = pairs / true boxes, f1 = 2 · pairs / (written + true boxes).
    """

    measure: Measure = "f1"
    threshold: float = 0.5

    range: ClassVar = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_threshold(self)
        problems = Problems()
        problems.one_of(("f1", "precision", "recall"), measure=self.measure)
        problems.raise_all("BoxMatch")

    def __call__(self, completion: Completion) -> float:
        matching = completion.matching
        written, true = len(matching.written), len(matching.true)
        if self.measure == "f1" or not written or not true:
            return matching.f1(self.threshold)
        return matching.num_pairs(self.threshold) / (written if self.measure == "precision" else true)


def _check_threshold(reward: IoUAbove | BoxMatch) -> None:
    problems = Problems()
    valid = is_number(reward.threshold) and 0 <= reward.threshold < 1
    problems.require(valid, "must be a number in [0, 1)", threshold=reward.threshold)
    problems.raise_all(type(reward).__name__)
