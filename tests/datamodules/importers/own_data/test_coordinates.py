from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.importers.own_data.coordinates import (
    Written,
    count_fits,
    misfit,
    read_numbers,
    refuse_misfits,
    to_unit,
)
from datamodules.importers.own_data.statement import COORDINATES, Coordinates
from datamodules.importers.reading.source import DataError
from datamodules.samples.boxes import box_fault
from datamodules.samples.sample import SampleError
from tests.datamodules.importers.own_data.own_files import LIMITS, numbers

SIZE = (640, 480)
edges = st.integers(0, 64).map(lambda k: k / 64)  # exact in every canvas used here
sides = st.tuples(edges, edges).filter(lambda pair: pair[0] != pair[1]).map(sorted)
unit_boxes = st.tuples(sides, sides).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1]))


@pytest.mark.parametrize("coordinates", COORDINATES)
@given(box=unit_boxes, size=st.sampled_from([(640, 512), (64, 128), (4032, 3008)]))
def test_a_box_comes_back_from_every_format(
    coordinates: Coordinates, box: tuple[float, float, float, float], size: tuple[int, int]
) -> None:
    values = numbers(box, size, coordinates)
    if min(size) > 2 and max(values) <= 1 and not coordinates.startswith("normalized"):
        assert misfit(values, coordinates, size, LIMITS) == "box_in_unit"
        return
    found, clamped = to_unit(values, coordinates, size, LIMITS, "s")
    assert found == pytest.approx(box, abs=1e-12) and not clamped
    if coordinates in ("pixels", "normalized"):
        assert found == box, "to the last digit"


@given(
    values=st.lists(st.floats(allow_nan=True) | st.integers(-(10**400), 10**400), min_size=4, max_size=4),
    coordinates=st.sampled_from(COORDINATES),
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_whatever_the_numbers_a_box_is_sound_or_named(
    values: list[float], coordinates: Coordinates, size: tuple[int, int]
) -> None:
    try:
        box, _ = to_unit(read_numbers(values, "s"), coordinates, size, LIMITS, "s")
    except SampleError as error:
        assert error.rule in ("not_finite_box", "degenerate_box", "out_of_range_box", "box_in_unit")
    else:
        assert box_fault(box) is None


@pytest.mark.parametrize(
    ("values", "coordinates", "rule"),
    [
        ([10, 20, 30, 40], "pixels", None),
        ([-0.6, 0, 640.9, 480], "pixels", None),
        ([10, 20, 642, 40], "pixels", "out_of_range_box"),
        ([30, 20, 10, 40], "pixels", "degenerate_box"),
        ([30, 20, 10, 40], "pixels_xywh", None),
        ([0.1, 0.2, 0.5, 0.6], "pixels", "box_in_unit"),
        ([0.1, 0.2, 0.5, 0.6], "relative_1000", "box_in_unit"),
        ([0.1, 0.2, 0.5, 0.6], "normalized", None),
        ([0.1, 0.2, 0.5, 1.01], "normalized", "out_of_range_box"),
        ([0.1, 0.2, 0.9, 0.8000000000000002], "normalized_xywh", None),  # a sum one rounding above 1
        ([0, 0, 1000, 1000], "relative_1000", None),
        ([0, 0, 1001, 1000], "relative_1000", "out_of_range_box"),
        ([10, 20, math.nan, 40], "pixels", "not_finite_box"),
        ([10, 20, math.inf, 40], "pixels", "not_finite_box"),
        ([0, 0, 0, 0], "pixels", "degenerate_box"),
    ],
)
def test_a_contradiction_is_named_and_never_repaired(
    values: list[float], coordinates: Coordinates, rule: str | None
) -> None:
    assert misfit(values, coordinates, SIZE, None) == rule
    if rule:
        with pytest.raises(SampleError, match=f"{rule}.*as {coordinates} of an image of 640x480"):
            to_unit(values, coordinates, SIZE, None, "s")


def test_only_edges_within_rounding_are_moved_to_the_border() -> None:
    assert to_unit([-0.5, 0, 64, 48.9], "pixels", (64, 48), None, "s") == ((0.0, 0.0, 1.0, 1.0), True)
    assert to_unit([0, 0, 64, 48], "pixels", (64, 48), None, "s") == ((0.0, 0.0, 1.0, 1.0), False)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ([1, 2, 3], "box_length"),
        ([1, 2], "box_length"),  # a point
        ([1, 2, 3, "4"], "field_type"),
        ([1, 2, 3, True], "field_type"),
        ("1 2 3 4", "field_type"),
        (None, "field_type"),
    ],
)
def test_what_is_no_four_numbers_is_named(values: object, rule: str) -> None:
    with pytest.raises(SampleError) as caught:
        read_numbers(values, "s")
    assert caught.value.rule == rule


def test_an_integer_of_any_length_is_infinite_and_not_an_error() -> None:
    assert read_numbers([10**400, 0, 1, 2], "s")[0] == math.inf


def written(count: int, values: tuple[float, ...]) -> list[Written]:
    return [Written(values, SIZE, f"train:{k}") for k in range(1, count + 1)]


def test_each_format_is_counted_by_the_boxes_that_it_admits() -> None:
    fits = count_fits([*written(3, (0.1, 0.1, 0.5, 0.5)), *written(2, (100, 100, 700, 470))], None)
    assert fits["normalized"] == 3 and fits["pixels"] == 0 and fits["relative_1000"] == 2
    assert "resized_pixels" not in fits
    assert "resized_pixels" in count_fits([], LIMITS)


def test_a_wrong_statement_is_refused_in_five_lines_with_the_likely_one() -> None:
    boxes = written(60, (10, 10, 600, 400)) + written(40, (0.1, 0.1, 0.5, 0.5))
    with pytest.raises(DataError) as caught:
        refuse_misfits("train.jsonl", boxes, "normalized", None, 0.05)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0] == "train.jsonl: 60% of 100 boxes cannot be normalized:"
    assert lines[1] == "  train:1 [10, 10, 600, 400] in 640x480: out_of_range_box"
    assert "pixels or relative_1000 fits 60%" in lines[4] and "--own.box_format=pixels" in lines[4]


def test_a_share_within_the_bound_is_left_to_the_records() -> None:
    boxes = written(96, (10, 10, 600, 400)) + written(4, (0.1, 0.1, 0.5, 0.5))
    assert refuse_misfits("f", boxes, "pixels", None, 0.05)["pixels"] == 96
    with pytest.raises(DataError, match="4% of 100 boxes cannot be pixels"):
        refuse_misfits("f", boxes, "pixels", None, 0.03)


def test_one_dirty_box_in_a_small_file_is_no_contradiction() -> None:
    good, bad = (10, 10, 600, 400), (10, 10, 900, 400)
    assert refuse_misfits("f", written(1, good) + written(2, bad), "pixels", None, 0.05)["pixels"] == 1
    with pytest.raises(DataError, match="100% of 2 boxes"):
        refuse_misfits("f", written(2, bad), "pixels", None, 0.05)
    with pytest.raises(DataError, match="75% of 4 boxes"):
        refuse_misfits("f", written(1, good) + written(3, bad), "pixels", None, 0.05)


def test_where_nothing_says_the_format_it_is_asked_for_with_what_each_would_fit() -> None:
    with pytest.raises(DataError) as caught:
        refuse_misfits("train.jsonl", written(4, (10, 10, 600, 400)), None, None, 0.05)
    text = str(caught.value)
    assert "nothing says what the numbers of a box mean" in text and "--own.box_format" in text
    assert "pixels 100%" in text and "normalized 0%" in text and len(text.splitlines()) == 3
    with pytest.raises(DataError, match="no image could be read"):
        refuse_misfits("train.jsonl", [], None, None, 0.05)


def test_a_file_that_fits_nothing_is_told_so() -> None:
    with pytest.raises(DataError, match="no format fits more of them: correct the file"):
        refuse_misfits("f", written(3, (5000, 10, 600, 400)), "pixels", None, 0.05)
