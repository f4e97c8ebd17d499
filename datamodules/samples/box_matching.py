"""Matching of the boxes that a model wrote with the true ones, over all images of a sample.

A written box can be the partner of a true one only in the same image. Every box has one partner at most.

The work is bounded: of a long answer only the first boxes are matched (`MAX_EXTRA`); the others count as wrong boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from datamodules.samples.answer_text import ParsedAnswer
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes, iou
from datamodules.samples.sample import BoxAnswer

MAX_EXTRA = 32  # written boxes that are matched, beyond the number of true ones


@dataclass(frozen=True)
class WrittenBox:
    """A box that the model wrote.

    `image` is an index into `Sample.images`. The one-box form names no image: its boxes are in the true box's image.
    In the form that names images it is None where the answer names no image of the sample. Such a box is always wrong.
    """

    image: int | None
    box: Box  # xyxy, 0-1 of that image; it may be inverted or outside. Without an image: the numbers as written
    label: str | None


def named_boxes(
    parsed: ParsedAnswer, image_sizes: Sequence[ImageSizes], box_format: BoxFormat
) -> tuple[WrittenBox, ...]:
    """The boxes of an answer that names images, in the order written.

    Args:
        parsed: the answer.
        image_sizes: the sizes of the sample's images, one entry an image. A box that names none is in the only image.
        box_format: how the model writes coordinates.
    """
    boxes = []
    for written in parsed.boxes:
        number = 1 if written.image is None and len(image_sizes) == 1 else written.image
        if number is None or not 1 <= number <= len(image_sizes):
            boxes.append(WrittenBox(None, written.values, written.label))
        else:
            unit = image_sizes[number - 1].to_unit(written.values, box_format)
            boxes.append(WrittenBox(number - 1, unit, written.label))
    return tuple(boxes)


@dataclass(frozen=True)
class BoxMatching:
    """W written boxes against T true ones."""

    written: tuple[WrittenBox, ...]
    true: tuple[BoxAnswer, ...]

    @cached_property
    def ious(self) -> list[dict[int, float]]:
        """For each of T true boxes: index of a written box -> IoU, where it is above 0."""
        by_image: dict[int | None, list[tuple[int, Box]]] = {}
        for index, one in enumerate(self.written[: len(self.true) + MAX_EXTRA]):
            by_image.setdefault(one.image, []).append((index, one.box))
        return [
            {index: value for index, box in by_image.get(answer.image, ()) if (value := iou(box, answer.box)) > 0.0}
            for answer in self.true
        ]

    def num_pairs(self, threshold: float) -> int:
        """The largest number of pairs whose IoU is above `threshold` (0 or more)."""
        if threshold not in self._pairs:
            self._pairs[threshold] = self._count_pairs(threshold)
        return self._pairs[threshold]

    @cached_property
    def _pairs(self) -> dict[float, int]:
        """The pairs at each threshold that was asked for: several rewards ask for the same one."""
        return {}

    def _count_pairs(self, threshold: float) -> int:
        """Maximum matching in a bipartite graph by augmenting paths (Kuhn 1955)."""
        fits = [[index for index, value in found.items() if value > threshold] for found in self.ious]
        partner: dict[int, int] = {}  # written box -> true box

        def augment(number: int, seen: set[int]) -> bool:
            """Find a partner for this true box; others may change theirs. At most as deep as there are true boxes."""
            for index in fits[number]:
                if index not in seen:
                    seen.add(index)
                    if index not in partner or augment(partner[index], seen):
                        partner[index] = number
                        return True
            return False

        return sum(augment(number, set()) for number in range(len(self.true)))

    def f1(self, threshold: float) -> float:
        """2 · pairs / (W + T), 0 to 1: 1 where every true box has a partner and no other box is written.

        A pair counts where its IoU is above `threshold`.
        """
        total = len(self.written) + len(self.true)
        return 2 * self.num_pairs(threshold) / total if self.written and self.true else 0.0

    @cached_property
    def iou_sum(self) -> float:
        """The sum of IoUs of the pairing in which it is largest."""
        return sum(self.ious[row][index] for row, index in best_pairing(self.ious).items())

    @cached_property
    def mean_iou(self) -> float:
        """The mean IoU of the pairing with the largest sum of IoUs, 0 to 1.

        It is over max(W, T): a box without a partner counts 0, whether it is missing or superfluous.
        """
        if not self.written or not self.true:
            return 0.0
        return min(1.0, self.iou_sum / max(len(self.written), len(self.true)))

    @cached_property
    def worst_iou(self) -> float:
        """The smallest IoU of the pairing in which it is largest; 0 where W and T differ, or a box has no partner.

        So f1(t) is 1 for every threshold t below it and for no other: it is to several boxes what IoU is to one.
        """
        if len(self.written) != len(self.true):
            return 0.0
        # The largest of the IoUs up to which every box keeps a partner, by bisection.
        values = sorted({value for found in self.ious for value in found.values()})
        low, high = 0, len(values)  # all boxes have partners above values[low - 1], not above values[high]
        while low < high:
            middle = (low + high) // 2
            below = values[middle - 1] if middle else 0.0  # above it means from values[middle] on
            if self.num_pairs(below) == len(self.true):
                low = middle + 1
            else:
                high = middle
        return values[low - 1] if low else 0.0


def best_pairing(values: Sequence[dict[int, float]]) -> dict[int, int]:
    """The pairing with the largest sum of values: row -> its index. A row without a partner is left out.

    (The assignment problem by shortest augmenting paths: Jonker and Volgenant 1987. SciPy's `linear_sum_assignment` is
    faster, but no dependency brings SciPy, and reading an answer costs more than this.)

    Args:
        values: for each of T rows (true boxes), index (of a written box) -> value (IoU), above 0.
    """
    # 1. A row needs at most T candidates: with more, one of its T best would be free.
    size = len(values)
    best = [sorted(found, key=found.__getitem__, reverse=True)[:size] for found in values]
    columns = {index: place for place, index in enumerate(sorted({index for row in best for index in row}))}
    # 2. One more column for each row, of value 0: the row stays without a partner.
    width = len(columns) + size
    costs = [[0.0] * width for _ in range(size)]
    for row, (indices, found) in enumerate(zip(best, values, strict=True)):
        for index in indices:
            costs[row][columns[index]] = -found[index]
    # 3. One row after the other enters the pairing along the shortest path; `rows_up` and `columns_up` are the dual
    # prices, under which no reduced cost is negative.
    rows_up, columns_up, owner = [0.0] * size, [0.0] * width, [-1] * width
    for start in range(size):
        distance, before = [float("inf")] * width, [-1] * width
        row, column, base = start, -1, 0.0
        reached, open_columns = [], list(range(width))
        while row >= 0:
            prices, offset, nearest, last = costs[row], base - rows_up[row], float("inf"), column
            for other in open_columns:
                value = offset + prices[other] - columns_up[other]
                if value < distance[other]:
                    distance[other], before[other] = value, last
                if distance[other] < nearest:
                    nearest, column = distance[other], other
            reached.append(column)
            open_columns.remove(column)
            row, base = owner[column], nearest
        rows_up[start] += base
        for other in reached[:-1]:
            rows_up[owner[other]] += base - distance[other]
            columns_up[other] -= base - distance[other]
        while column >= 0:  # each row on the path takes the column that was found from it
            previous = before[column]
            owner[column] = start if previous < 0 else owner[previous]
            column = previous
    pairs = ((owner[place], index) for index, place in columns.items() if owner[place] >= 0)
    return {row: index for row, index in pairs if index in values[row]}
