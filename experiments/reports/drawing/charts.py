"""The charts of all pages: this file computes positions; pages/*_chart.html.j2 have the markup.

Text stands beside the drawing as HTML, so it has the same size on a phone as on a large screen. pages/charts.js adds
the values below the pointer, and the keys for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from experiments.reports.drawing.chart_axes import Axis, step_axis, value_axis
from experiments.reports.drawing.templates import render

COLOURS = ("#3465a4", "#c4542d", "#4e8a2e", "#8257a8", "#96730f", "#24807f")
DASHES = ("none", "6 3", "2 3")
Points = Sequence[tuple[float, float]]

SIDE = 1000  # a drawing has this many units in both directions, whatever its size on the screen
MANY = 20  # with more points, a curve is drawn as its running mean, with the logged values behind it


@dataclass(frozen=True)
class Bar:
    """A percentage (0-100) with the limits of its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def line_chart(title: str, curves: Mapping[str, Points], legend: Sequence[str] | None = None) -> Markup:
    """A chart of curves over training steps; an empty text if there are no curves.

    Args:
        title: text above the chart.
        curves: name -> (step, value) points. Empty curves are skipped.
        legend: names in the order of a common legend that the page shows for many charts. The index in this order gives
            the colour of a curve (`curve_style`), and its element is <g data-curve="index">. None: the chart has its
            own legend.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return Markup()
    x = step_axis([x for points in curves.values() for x, _ in points])
    y = value_axis([y for points in curves.values() for _, y in points])
    drawn = []
    for number, (name, points) in enumerate(curves.items()):
        place = number if legend is None else legend.index(name)
        colour, dash = curve_style(place)
        # A dense curve is hard to read, so its running mean is drawn over it.
        lines = [points, smooth(points)] if len(points) > MANY else [points]
        placed = [[_place(x, y, point) for point in line] for line in lines]
        drawn.append({"name": name, "place": place, "colour": colour, "dash": dash, "lines": placed})
    return render(
        "line_chart.html.j2",
        title=title,
        curves=drawn,
        summary=_summary(title, curves),
        last=_last_values(curves),
        has_legend=legend is not None,
        x=_axis_values(x),
        y=_axis_values(y),
    )


def bar_chart(title: str, groups: Sequence[str], series: Mapping[str, Mapping[str, float | Bar]]) -> Markup:
    """Groups of horizontal bars of percentages: one group for each of `groups`, in it one bar for each of `series`.

    If a series has no value for a group, the bar is left out. Returns an empty text if there is no group.
    """
    if not groups:
        return Markup()
    rows = []
    for group in groups:
        bars = []
        for place, (name, values) in enumerate(series.items()):
            if group in values:
                found = values[group]
                bar = found if isinstance(found, Bar) else Bar(found)
                limits = None if bar.low is None or bar.high is None else (_percent(bar.low), _percent(bar.high))
                bars.append({"name": name, "colour": curve_style(place)[0], "limits": limits})
                bars[-1] |= {"length": _percent(bar.value), "text": f"{bar.value:.1f}"}
        rows.append({"name": group, "bars": bars})
    legend = [{"name": name, "colour": curve_style(place)[0]} for place, name in enumerate(series)]
    return render("bar_chart.html.j2", title=title, groups=rows, legend=legend)


def curve_style(place: int) -> tuple[str, str]:
    """Colour and SVG dash pattern of a curve, from its index in the legend."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def smooth(points: Points) -> list[tuple[float, float]]:
    """A centred running mean over about 5 % of the points."""
    reach = max(1, round(len(points) * 0.05 / 2))
    means = []
    for k, (x, _) in enumerate(points):
        # At both ends the window is smaller, so the mean is over fewer points.
        near = [y for _, y in points[max(0, k - reach) : k + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _place(x: Axis, y: Axis, point: tuple[float, float]) -> tuple[float, float]:
    """The place of a point in the drawing. SVG's y grows downwards."""
    return round(SIDE * x.share(point[0]), 2), round(SIDE * (1 - y.share(point[1])), 2)


def _axis_values(axis: Axis) -> dict[str, Any]:
    ticks = [{"share": round(100 * axis.share(value), 3), "text": text} for value, text in axis.ticks()]
    width = max((len(tick["text"]) for tick in ticks), default=1)
    return {"low": axis.low, "high": axis.high, "ticks": ticks, "width": width}


def _summary(title: str, curves: Mapping[str, Points]) -> str:
    """The chart in words, for readers who do not see it."""
    parts = []
    for name, points in curves.items():
        values = [y for _, y in points]
        ends = f"from {points[0][1]:.3g} at step {points[0][0]:.0f} to {points[-1][1]:.3g} at step {points[-1][0]:.0f}"
        parts.append(f"{name}: {ends}, lowest {min(values):.3g}, highest {max(values):.3g}")
    return f"{title}. {'; '.join(parts)}."


def _last_values(curves: Mapping[str, Points]) -> str:
    step = max(points[-1][0] for points in curves.values())
    return f"step {step:.0f}: " + ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in curves.items())


def _percent(value: float) -> float:
    return round(min(max(value, 0.0), 100.0), 2)
