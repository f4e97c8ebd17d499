"""IoU, box validity and the conversions of ImageSizes."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from datamodules.samples.boxes import BoxFormat, ImageSizes, box_fault, fit_size, from_pixels_xywh, iou

GRID = 12
cells = st.integers(-2, GRID)
grid_boxes = st.tuples(cells, cells, cells, cells)
sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
box_formats = st.sampled_from(list(BoxFormat))
NAN, INF = math.nan, math.inf


@st.composite
def unit_boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    """Valid 0-1 xyxy boxes."""
    x1, x2 = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    y1, y2 = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    assume(x1 < x2 and y1 < y2)
    return x1, y1, x2, y2


def counted_iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """IoU by counting unit cells: an independent reference for integer boxes."""

    def covered(box: tuple[int, ...]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    cells_a, cells_b = covered(a), covered(b)
    return len(cells_a & cells_b) / len(cells_a | cells_b) if cells_a and cells_b else 0.0


@given(grid_boxes, grid_boxes)
def test_iou_equals_counting_cells(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert iou(a, b) == pytest.approx(counted_iou(a, b), abs=1e-12)


@given(unit_boxes(), unit_boxes())
def test_iou_is_symmetric_bounded_and_one_for_equal_boxes(a, b) -> None:
    assert iou(a, b) == pytest.approx(iou(b, a))
    assert 0.0 <= iou(a, b) <= 1.0
    if (a[2] - a[0]) * (a[3] - a[1]) > 0:  # the product of two tiny sides may underflow
        assert iou(a, a) == 1.0


any_floats = st.floats(allow_nan=True, allow_infinity=True)


@given(*[st.tuples(any_floats, any_floats, any_floats, any_floats)] * 2)
@example((-1e308, -1e308, 1e308, 1e308), (-1e308, -1e308, 1e308, 1e308))
@example((0.0, 0.0, 1e-320, 1e-320), (0.0, 0.0, 1e-320, 1e-320))
def test_iou_never_leaves_its_range_whatever_the_numbers(a, b) -> None:
    assert 0.0 <= iou(a, b) <= 1.0  # false for NaN


def test_identical_boxes_one_pixel_wide_score_one() -> None:
    assert iou((10, 10, 11, 40), (10, 10, 11, 40)) == 1.0


@pytest.mark.parametrize("empty", [(5, 5, 5, 5), (5, 5, 5, 9), (9, 5, 5, 9), (5, 9, 9, 5), (9, 9, 5, 5)])
def test_empty_and_inverted_boxes_score_zero_even_against_themselves(empty) -> None:
    assert iou(empty, empty) == 0.0
    assert iou(empty, (0, 0, 10, 10)) == 0.0


def test_touching_boxes_do_not_overlap() -> None:
    assert iou((0, 0, 5, 5), (5, 0, 10, 5)) == 0.0


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((0, 0, 1, 1), None),
        ((0.2, 0.3, 0.4, 0.5), None),
        ((0.2, 0.3, 0.2 + 1e-9, 0.5), None),
        ((0.4, 0.3, 0.2, 0.5), "degenerate"),
        ((0.2, 0.5, 0.4, 0.3), "degenerate"),
        ((0.2, 0.3, 0.2, 0.5), "degenerate"),
        ((0.2, 0.3, 0.4, 0.3), "degenerate"),
        ((-0.01, 0, 1, 1), "out_of_range"),
        ((0, -1e-9, 1, 1), "out_of_range"),
        ((0.1, 0.1, 1.048, 0.5), "out_of_range"),
        ((0.1, 0.1, 0.5, 1.035), "out_of_range"),
        ((5, 0, 2, 1), "degenerate"),
        ((NAN, 0, 1, 1), "not_finite"),
        ((0, 0, INF, 1), "not_finite"),
        ((1, 1, -INF, 0), "not_finite"),
        ((NAN, NAN, NAN, NAN), "not_finite"),
    ],
)
def test_box_fault_names_the_first_fault(box, fault) -> None:
    assert box_fault(box) == fault


@given(unit_boxes(), sizes, sizes, box_formats)
def test_a_box_returns_from_any_convention_within_one_step_of_its_grid(box, original, resized, box_format) -> None:
    sizes = ImageSizes(original, resized)
    back = sizes.to_unit(sizes.to_model(box, box_format), box_format)
    steps = {
        BoxFormat.ABSOLUTE_PIXELS: [
            1 / size for size in (*resized, *resized)
        ],  # half a pixel, or one at the clipped edge
        BoxFormat.RELATIVE_1000: [0.0005] * 4,
        BoxFormat.NORMALIZED: [0.0005] * 4,
    }[box_format]
    assert all(abs(a - b) <= step + 1e-12 for a, b, step in zip(box, back, steps, strict=True))


@given(st.data(), sizes, sizes, box_formats)
def test_a_models_own_numbers_return_unchanged(data, original, resized, box_format) -> None:
    width, height = {
        BoxFormat.ABSOLUTE_PIXELS: (resized[0] - 1, resized[1] - 1),
        BoxFormat.RELATIVE_1000: (1000, 1000),
        BoxFormat.NORMALIZED: (1000, 1000),
    }[box_format]
    values = tuple(data.draw(st.integers(0, size)) for size in (width, height, width, height))
    if box_format is BoxFormat.NORMALIZED:
        values = tuple(value / 1000 for value in values)
    sizes = ImageSizes(original, resized)
    assert sizes.to_model(sizes.to_unit(values, box_format), box_format) == values


@given(unit_boxes(), sizes, sizes)
def test_what_a_model_writes_is_in_its_range(box, original, resized) -> None:
    sizes = ImageSizes(original, resized)
    x1, y1, x2, y2 = sizes.to_model(box, BoxFormat.ABSOLUTE_PIXELS)
    assert 0 <= x1 <= x2 < resized[0] and 0 <= y1 <= y2 < resized[1]
    for box_format in (BoxFormat.ABSOLUTE_PIXELS, BoxFormat.RELATIVE_1000):
        assert all(isinstance(value, int) for value in sizes.to_model(box, box_format))
    assert all(0 <= value <= 1000 for value in sizes.to_model(box, BoxFormat.RELATIVE_1000))


def test_conversions_of_one_worked_example() -> None:
    sizes = ImageSizes.from_grid(original=(640, 480), grid_hw=(34, 46), patch_size=14)
    assert sizes.resized == (644, 476)
    box = (0.25, 0.5, 0.75, 1.0)
    assert sizes.to_model(box, BoxFormat.ABSOLUTE_PIXELS) == (161, 238, 483, 475)
    assert sizes.to_model(box, BoxFormat.RELATIVE_1000) == (250, 500, 750, 1000)
    assert sizes.to_model((1 / 3, 0, 2 / 3, 1), BoxFormat.NORMALIZED) == (0.333, 0, 0.667, 1)
    assert sizes.to_pixels(box) == (160, 240, 480, 480)
    assert sizes.to_unit((161, 238, 483, 476), "absolute_pixels") == box


def test_a_perfect_pixel_box_below_1000_is_not_read_as_per_mille() -> None:
    sizes = ImageSizes(original=(640, 480), resized=(644, 476))
    truth = (0.5, 0.5, 0.9, 0.9)
    written = sizes.to_model(truth, BoxFormat.ABSOLUTE_PIXELS)
    assert max(written) <= 1000
    assert iou(sizes.to_unit(written, BoxFormat.ABSOLUTE_PIXELS), truth) > 0.99
    assert iou(sizes.to_unit(written, BoxFormat.RELATIVE_1000), truth) < 0.5


def test_one_means_the_same_in_every_position_and_convention() -> None:
    sizes = ImageSizes(original=(50, 50), resized=(100, 100))
    assert sizes.to_unit((0, 0, 1, 1), BoxFormat.NORMALIZED) == (0, 0, 1, 1)
    assert sizes.to_unit((0, 0, 1, 1), BoxFormat.ABSOLUTE_PIXELS) == (0, 0, 0.01, 0.01)
    assert sizes.to_unit((0, 0, 1, 1), BoxFormat.RELATIVE_1000) == (0, 0, 0.001, 0.001)


def test_reading_a_models_numbers_neither_clips_nor_reorders() -> None:
    sizes = ImageSizes(original=(100, 100), resized=(100, 100))
    assert sizes.to_unit((90, -10, 20, 150), BoxFormat.ABSOLUTE_PIXELS) == (0.9, -0.1, 0.2, 1.5)


@pytest.mark.parametrize("limits", [(28, 56 * 56, 14 * 14 * 4 * 1280), (32, 784, 40_000), (28, 3136, 10_000)])
def test_fitted_sizes_are_those_of_qwens_processor_and_stay_as_they_are(limits) -> None:
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    rng = random.Random(0)
    for _ in range(500):
        size = rng.randrange(20, 3000), rng.randrange(20, 3000)
        fitted = fit_size(size, *limits)
        height, width = smart_resize(size[1], size[0], *limits)
        if min(height, width) > 0:  # transformers' own rounds a short side to nothing; qwen_vl_utils does not
            assert fitted == (width, height), size
        if fitted[0] * fitted[1] <= limits[2]:
            assert fit_size(fitted, *limits) == fitted
        assert all(side % limits[0] == 0 and side > 0 for side in fitted)


@pytest.mark.parametrize("bad", [((0, 5), (5, 5)), ((5, 5), (5, 0)), ((-1, 5), (5, 5))])
def test_geometry_refuses_empty_images(bad) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ImageSizes(*bad)


@given(unit_boxes(), sizes)
def test_coco_boxes_are_the_same_place_in_unit_coordinates(box: tuple[float, ...], size: tuple[int, int]) -> None:
    x1, y1, x2, y2 = ImageSizes(size, size).to_pixels(box)
    found, _ = from_pixels_xywh((x1, y1, x2 - x1, y2 - y1), size)
    assert found == pytest.approx(box, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "unit", "clamped"),
    [
        ((10, 20, 30, 40), (0.1, 0.1, 0.4, 0.3), False),
        ((0, 0, 100, 200), (0.0, 0.0, 1.0, 1.0), False),
        ((-1, -0.2, 50, 200.9), (0.0, 0.0, 0.49, 1.0), True),
        ((-1.5, 0, 50, 100), (-0.015, 0.0, 0.485, 0.5), False),
        ((60, 0, 41.5, 100), (0.6, 0.0, 1.015, 0.5), False),
    ],
)
def test_coco_boxes_less_than_a_pixel_outside_are_moved_onto_the_border(values, unit, clamped) -> None:
    found, was_clamped = from_pixels_xywh(values, (100, 200))
    assert found == pytest.approx(unit) and was_clamped == clamped
