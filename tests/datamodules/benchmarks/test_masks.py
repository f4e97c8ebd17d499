"""Boxes from polygons and run lengths, against masks unpacked pixel by pixel."""

from __future__ import annotations

import random

import pytest

from datamodules.benchmarks.masks import encode_counts, rle_box, union_box
from datamodules.benchmarks.polygons import polygons_box


def slow_box(runs: list[int], height: int, width: int) -> tuple[int, int, int, int] | None:
    pixels = [index % 2 for index, run in enumerate(runs) for _ in range(run)]
    ones = [divmod(place, height) for place, value in enumerate(pixels) if value]
    if not ones:
        return None
    xs, ys = [x for x, _ in ones], [y for _, y in ones]
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


@pytest.mark.parametrize("seed", range(60))
def test_the_box_of_run_lengths_is_that_of_the_unpacked_mask(seed: int) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(1, 9), rng.randint(1, 9)
    cuts = sorted(rng.sample(range(height * width + 1), rng.randint(0, min(6, height * width))))
    runs = [after - before for before, after in zip([0, *cuts], [*cuts, height * width], strict=True)]
    expected = slow_box(runs, height, width)
    assert rle_box({"size": [height, width], "counts": runs}) == expected
    assert rle_box({"size": [height, width], "counts": encode_counts(runs)}) == expected


def test_compressed_counts_by_hand() -> None:
    # 2 3 1 1 -> "2", "3", "1", and 1 - 3 = -2 -> 30 -> "N"; 40 -> 8 with the mark of more -> "X", then "1".
    assert encode_counts([2, 3, 1, 1]) == "231N"
    assert encode_counts([40]) == "X1"
    assert rle_box({"size": [7, 1], "counts": "231N"}) == (0, 2, 1, 7)


@pytest.mark.parametrize("rle", [{"size": [2, 2], "counts": [1, 2]}, {"size": [2, 2], "counts": "X"}])
def test_runs_that_do_not_fill_the_mask_are_an_error(rle) -> None:
    with pytest.raises(ValueError, match="RLE"):
        rle_box(rle)


def square(x1: int, y1: int, x2: int, y2: int) -> list[list[float]]:
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def test_a_polygons_box_holds_its_outline() -> None:
    assert polygons_box([(square(2, 3, 6, 8), 1)], (20, 10)) == (2, 3, 7, 9)
    assert polygons_box([(square(2, 3, 6, 8), 1), (square(10, 1, 12, 4), 1)], (20, 10)) == (2, 1, 13, 9)


def test_a_smaller_ignored_polygon_cuts_into_the_target_and_a_larger_one_does_not() -> None:
    target = (square(2, 2, 12, 8), 1)
    assert polygons_box([target, (square(9, 1, 13, 9), 255)], (20, 10)) == (2, 2, 9, 9)
    assert polygons_box([target, (square(0, 0, 19, 9), 255)], (20, 10)) == (2, 2, 13, 9)
    assert polygons_box([(square(2, 2, 4, 4), 255)], (20, 10)) is None


def test_the_union_of_boxes_leaves_out_what_is_not_there() -> None:
    assert union_box([None, (1, 2, 3, 4), (2, 1, 5, 3)]) == (1, 1, 5, 4)
    assert union_box([None]) is None
