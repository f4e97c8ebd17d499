"""GIoU, DIoU and CIoU of torchvision against the project's IoU, the papers' formulas, and torchmetrics."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest
import torch
import torchmetrics.functional.detection as published
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.samples.boxes import Box, iou
from lightning_modules.rl.box_overlaps import LOWEST, OverlapKind, overlap

KINDS = get_args(OverlapKind)
VARIANTS = ("giou", "diou", "ciou")
PUBLISHED = {
    "iou": published.intersection_over_union,
    "giou": published.generalized_intersection_over_union,
    "diou": published.distance_intersection_over_union,
    "ciou": published.complete_intersection_over_union,
}


def random_boxes(count: int, seed: int = 0) -> list[tuple[Box, Box]]:
    """Pairs of boxes with sides of at least 0.02; a third of the pairs are near each other."""
    rng = random.Random(seed)

    def box() -> Box:
        x1, y1 = rng.uniform(0, 0.9), rng.uniform(0, 0.9)
        return x1, y1, rng.uniform(x1 + 0.02, 1), rng.uniform(y1 + 0.02, 1)

    pairs = [(box(), box()) for _ in range(count)]
    near = [(a, tuple(value + rng.uniform(-0.009, 0.009) for value in a)) for a, _ in pairs[: count // 3]]
    return [*near, *pairs[count // 3 :]]


def by_formula(kind: str, a: Box, b: Box) -> float:
    """The papers' formulas, number by number."""
    overlap_of_both = iou(a, b)
    hull = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    width, height = hull[2] - hull[0], hull[3] - hull[1]
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    union = (area_a + area_b) / (1 + overlap_of_both)
    if kind == "giou":
        return overlap_of_both - (width * height - union) / (width * height)
    centres = math.hypot((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    diou = overlap_of_both - centres**2 / (width**2 + height**2)
    if kind == "diou":
        return diou
    angles = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return diou if v == 0 else diou - v / (1 - overlap_of_both + v) * v


@pytest.mark.parametrize("kind", VARIANTS)
def test_it_is_the_papers_formula_over_the_projects_iou(kind: OverlapKind) -> None:
    for a, b in random_boxes(600):
        assert overlap(kind, a, b) == pytest.approx(by_formula(kind, a, b), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_torchmetrics_gives(kind: OverlapKind) -> None:
    pairs = random_boxes(600, seed=1)
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    theirs = PUBLISHED[kind](first, second, aggregate=False).diagonal().tolist()
    assert [overlap(kind, *pair) for pair in pairs] == pytest.approx(theirs, abs=2e-4)  # float32, eps of 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_fits_itself_best_and_no_variant_exceeds_the_iou(kind: OverlapKind) -> None:
    for a, b in random_boxes(200, seed=2):
        assert overlap(kind, a, a) == pytest.approx(1.0)
        assert LOWEST[kind] <= overlap(kind, a, b) <= iou(a, b) + 1e-9


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_near_miss_is_better_than_a_far_one_which_iou_cannot_tell(kind: OverlapKind) -> None:
    truth, near, far = (0.1, 0.1, 0.2, 0.2), (0.25, 0.1, 0.35, 0.2), (0.8, 0.8, 0.9, 0.9)
    assert iou(near, truth) == iou(far, truth) == 0.0
    assert overlap(kind, near, truth) > overlap(kind, far, truth)


any_floats = st.floats(allow_nan=True, allow_infinity=True)
any_boxes = st.tuples(any_floats, any_floats, any_floats, any_floats)


@pytest.mark.parametrize("kind", KINDS)
@given(any_boxes, any_boxes)
@example((-1e308, -1e308, 1e308, 1e308), (-1e308, -1e308, 1e308, 1e308))
@example((0.0, 0.0, 1e-160, 1e-160), (0.0, 0.0, 1.0, 1.0))
@example((0.0, 0.0, 1.0, 1.0), (1e160, 1e160, 1e161, 1e161))
def test_it_never_leaves_its_range_whatever_the_numbers(kind: OverlapKind, a: Box, b: Box) -> None:
    assert LOWEST[kind] <= overlap(kind, a, b) <= 1.0  # false for NaN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [(0.5, 0.5, 0.5, 0.9), (0.9, 0.5, 0.5, 0.9), (0.1, 0.2, math.nan, 0.9)])
def test_no_box_that_misses_is_worse_than_a_box_without_an_area(kind: OverlapKind, empty: Box) -> None:
    truth = (0.1, 0.1, 0.2, 0.2)
    assert overlap(kind, empty, truth) == LOWEST[kind] <= overlap(kind, (0.98, 0.01, 0.99, 0.9), truth)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap='eiou' is none of iou, giou, diou, ciou"):
        overlap("eiou", (0, 0, 1, 1), (0, 0, 1, 1))  # type: ignore[arg-type]
