"""Charts: round ticks, nothing below zero that need not be, and drawings inside their frame."""

from __future__ import annotations

import math
import random
from xml.etree import ElementTree

import pytest

from experiments.reports.drawing import charts
from experiments.reports.drawing.chart_axes import step_axis, value_axis

SVG = "{http://www.w3.org/2000/svg}"
RANGES = [(0.0, 1.0), (0.02, 6.87), (1e-5, 3e-4), (-3.2, 9.0), (0.0, 0.0), (5.0, 5.0), (-2.0, -2.0), (1e9, 1e9 + 1e-4)]
RANGES += [(0.0, 1e-9), (123456.0, 9876543.0), (36.0, 36.0 + 1e-14), (0.3, 0.6)]


@pytest.mark.parametrize("values", RANGES)
def test_a_value_axis_covers_its_values_with_round_ticks(values: tuple[float, float]) -> None:
    axis = value_axis(values)
    ticks = axis.ticks()
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low <= values[0] + slack and axis.high >= values[1] - slack
    assert (axis.low >= 0) == (min(values) >= 0), "below zero only where a value is"
    assert 2 <= len(ticks) <= 7
    assert ticks[0][0] == pytest.approx(axis.low, abs=slack) and ticks[-1][0] == pytest.approx(axis.high, abs=slack)
    mantissa = axis.step / 10 ** math.floor(math.log10(axis.step) + 1e-9)
    assert any(math.isclose(mantissa, round_one) for round_one in (1, 2, 2.5, 5))


def test_ticks_of_any_range_are_round_few_and_different() -> None:
    rng = random.Random(0)
    for _ in range(500):
        low = rng.choice([0.0, rng.uniform(-1, 1), rng.uniform(0, 1)]) * 10 ** rng.uniform(-6, 6)
        axis = value_axis([low, low + 10 ** rng.uniform(-3, 3) * (abs(low) or 1)])
        texts = [text for _, text in axis.ticks()]
        assert 2 <= len(texts) == len(set(texts)) <= 8, (axis, texts)
        assert max(map(len, texts)) <= 12, texts


def test_texts_of_ticks_have_the_decimals_that_they_need() -> None:
    assert [text for _, text in value_axis([0, 0.93]).ticks()] == ["0", "0.25", "0.50", "0.75", "1.00"]
    assert [text for _, text in value_axis([0, 6.87]).ticks()] == ["0", "2", "4", "6", "8"]
    assert [text for _, text in value_axis([0, 7.9e-5]).ticks()] == ["0", "2e-5", "4e-5", "6e-5", "8e-5"]
    assert [text for _, text in value_axis([0, 12000]).ticks()] == ["0", "5,000", "10,000", "15,000"]


@pytest.mark.parametrize("steps", [(0, 159), (79, 79), (0, 0), (0, 1), (3, 8), (100, 20000), (0, 12)])
def test_steps_are_whole_and_end_where_the_curve_ends(steps: tuple[int, int]) -> None:
    axis = step_axis(steps)
    values = [value for value, _ in axis.ticks()]
    assert all(value == round(value) for value in values) and 1 <= len(values) <= 7
    assert axis.low >= 0 and (steps[0] == steps[1] or (axis.low, axis.high) == steps)


@pytest.mark.parametrize(
    "points", [[(0, 1.0)], [(5, 2.0), (5, 2.0)], [(k, k % 7) for k in range(100)], [(0, -1), (1, 1e9)]]
)
def test_charts_are_well_formed_and_stay_inside_their_frame(points: list) -> None:
    tree = ElementTree.fromstring(charts.line_chart("a < b", {"x & y": points, "empty": []}))
    lines = [line.get("points").split() for line in tree.iter(f"{SVG}polyline")]
    assert len(lines) == (2 if len(points) > charts.MANY else 1)
    for place in (place for line in lines for place in line):
        assert all(0 <= float(number) <= charts.SIDE for number in place.split(","))
    ticks = [span.get("style") for span in tree.iter("span") if span.get("class") == "tick"]
    assert all(0 <= float(style.split(": ")[1].rstrip("%")) <= 100 for style in ticks)
    assert "lowest" in next(tree.iter(f"{SVG}svg")).get("aria-label")


def test_bars_are_as_long_as_their_values_and_show_them() -> None:
    series = {"base": {"diff": charts.Bar(50, 40, 60), "region": 100}}
    tree = ElementTree.fromstring(charts.bar_chart("t", ["diff", "region"], series))
    spans = [span for span in tree.iter("span") if span.get("class") == "bar"]
    assert [span.get("style").split(";")[0] for span in spans] == ["width: 50%", "width: 100%"]
    intervals = [span.get("style") for span in tree.iter("span") if span.get("class") == "interval"]
    assert intervals == ["left: 40%; width: 20%"]
    assert [span.text for span in tree.iter("span") if span.get("class") == "bar-value"] == ["50.0", "100.0"]


def test_a_bar_that_was_not_measured_is_left_out_and_not_a_zero() -> None:
    tree = ElementTree.fromstring(charts.bar_chart("t", ["diff", "region"], {"base": {"region": 0.0}, "grpo": {}}))
    assert [span.text for span in tree.iter("span") if span.get("class") == "bar-value"] == ["0.0"]


def test_no_points_make_no_chart() -> None:
    assert charts.line_chart("t", {"a": []}) == "" and charts.bar_chart("t", [], {}) == ""


def test_smoothing_keeps_a_constant_and_the_number_of_points() -> None:
    points = [(k, 3.0) for k in range(50)]
    assert charts.smooth(points) == points
