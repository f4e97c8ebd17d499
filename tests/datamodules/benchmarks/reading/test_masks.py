"""Boxes from run lengths, against masks unpacked pixel by pixel."""

from __future__ import annotations

import random

import pytest

from datamodules.benchmarks.reading.masks import encode_counts, rle_box, union_box


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


def test_the_union_of_boxes_leaves_out_what_is_not_there() -> None:
    assert union_box([None, (1, 2, 3, 4), (2, 1, 5, 3)]) == (1, 1, 5, 4)
    assert union_box([None]) is None
