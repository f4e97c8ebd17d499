"""Rewards for the box of an answer. Each class documents its range; a text without a box gets the lowest value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from datamodules.persistence.problems import Problems
from datamodules.samples.boxes import iou
from datamodules.samples.sample import BoxAnswer
from lightning_modules.rl.rewards.box_overlaps import LOWEST, OverlapKind, overlap
from lightning_modules.rl.rewards.completion import Completion, WrittenBox

Measure = Literal["f1", "precision", "recall"]


class IoU:
    """r_acc of eq. 3: the IoU of the answer's box with the true box, 0 to 1; 0 if no box can be read."""

    range = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        return completion.score.iou


@dataclass(frozen=True)
class IoUAbove:
    """1 if the IoU is above `threshold`, otherwise 0. Benchmarks count an answer with an IoU above 0.5 as right."""

    threshold: float = 0.5

    range: ClassVar = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_threshold(self)

    def __call__(self, completion: Completion) -> float:
        return float(completion.score.iou > self.threshold)


class _Overlap:
    """An overlap that also distinguishes near misses from far misses (`box_overlaps`)."""

    kind: ClassVar[OverlapKind]
    range: ClassVar[tuple[float, float]]

    def __call__(self, completion: Completion) -> float:
        box, answer = completion.score.box, completion.sample.answer
        return self.range[0] if box is None else overlap(self.kind, box, answer.box)


class GIoU(_Overlap):
    """Generalized IoU, -1 to 1; -1 if no box can be read."""

    kind, range = "giou", (LOWEST["giou"], 1.0)


class DIoU(_Overlap):
    """Distance IoU, -1 to 1; -1 if no box can be read."""

    kind, range = "diou", (LOWEST["diou"], 1.0)


class CIoU(_Overlap):
    """Complete IoU, -1.5 to 1; -1.5 if no box can be read."""

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
        written, true = completion.boxes, completion.true_boxes
        if not written or not true:
            return 0.0
        pairs = count_pairs(written, true, self.threshold)
        counts = {"f1": (len(written) + len(true)) / 2, "precision": len(written), "recall": len(true)}
        return pairs / counts[self.measure]


def count_pairs(written: Sequence[WrittenBox], true: Sequence[BoxAnswer], threshold: float) -> int:
    """The largest number of pairs of a written and a true box in the same image whose IoU is above `threshold`.

    Each box is in at most one pair. (Maximum matching in a bipartite graph by augmenting paths, Kuhn 1955.)
    """
    fits = [
        [k for k, box in enumerate(written) if box.image == answer.image and iou(box.box, answer.box) > threshold]
        for answer in true
    ]
    partner: dict[int, int] = {}  # written box -> true box

    def augment(number: int, seen: set[int]) -> bool:
        """Find a partner for this true box; other true boxes may change their partners.

        The recursion depth is at most the number of true boxes.
        """
        for k in fits[number]:
            if k not in seen:
                seen.add(k)
                if k not in partner or augment(partner[k], seen):
                    partner[k] = number
                    return True
        return False

    return sum(augment(number, set()) for number in range(len(true)))


def _check_threshold(reward: IoUAbove | BoxMatch) -> None:
    problems = Problems()
    problems.require(0 <= reward.threshold < 1, "must be in [0, 1)", threshold=reward.threshold)
    problems.raise_all(type(reward).__name__)
