"""Small SVG charts without scripts: this file converts numbers to pixels; pages/*.svg.j2 has the markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from experiments.reports.templates import render

COLOURS = ("#3465a4", "#c4542d", "#4e8a2e", "#8257a8", "#b08a1e", "#2f8f8f")
DASHES = ("none", "6 3", "2 3")
Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 30  # margins for the axis labels and the title
MANY = 20  # with more points, a curve is drawn as its running mean, with the logged values behind it


class Axis(NamedTuple):
    """An axis: values from `low` to `high` are mapped to the pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, float]]:
        """Five pairs (pixel, value), evenly spaced."""
        values = [self.low + k / 4 * (self.high - self.low) for k in range(5)]
        return [(self.place(value), value) for value in values]


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
    # SVG's y grows downwards: the y axis starts at the bottom, the larger pixel value.
    x = _axis([x for points in curves.values() for x, _ in points], 0.0, LEFT, WIDTH - RIGHT)
    y = _axis([y for points in curves.values() for _, y in points], 0.05, HEIGHT - BOTTOM, TOP)
    drawn = []
    for number, (name, points) in enumerate(curves.items()):
        place = number if legend is None else legend.index(name)
        colour, dash = curve_style(place)
        # A dense curve is hard to read, so its running mean is drawn over it.
        lines = [points, smooth(points)] if len(points) > MANY else [points]
        pixels = [[(x.place(step), y.place(value)) for step, value in line] for line in lines]
        drawn.append({"name": name, "place": place, "colour": colour, "dash": dash, "lines": pixels})
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP}
    frame |= {"bottom": HEIGHT - BOTTOM, "x_ticks": x.ticks(), "y_ticks": y.ticks()}
    return render("line_chart.svg.j2", title=title, curves=drawn, has_legend=legend is not None, **frame)


def bar_chart(title: str, groups: Sequence[str], series: Mapping[str, Mapping[str, float]]) -> Markup:
    """Grouped bars of percentages (0-100): one group for each of `groups`, in it one bar for each of `series`.

    If a series has no value for a group, there is a gap. Returns an empty text if there is no group.
    """
    if not groups:
        return Markup()
    # Pixels: a bar takes 16, the gap between groups 14, a character of the legend about 7.
    step, names = 16 * len(series) + 14, [max(90, 7 * len(name) + 20) for name in series]
    width, height, base = max(WIDTH, LEFT + RIGHT + step * len(groups), LEFT + sum(names)), 300, 210
    y = Axis(0.0, 100.0, base, TOP + 16)
    bars = [
        {
            "x": LEFT + g * step + 6 + 16 * k,
            "y": y.place(min(max(values[group], 0.0), 100.0)),
            "colour": COLOURS[k % len(COLOURS)],
            "title": f"{group}: {min(max(values[group], 0.0), 100.0):.1f}",
        }
        for g, group in enumerate(groups)
        for k, values in enumerate(series.values())
        if group in values
    ]
    legend = [(LEFT + sum(names[:k]), COLOURS[k % len(COLOURS)], name) for k, name in enumerate(series)]
    places = [(LEFT + g * step + 14 + 8 * len(series), group) for g, group in enumerate(groups)]
    frame = {"width": width, "height": height, "left": LEFT, "right": width - RIGHT, "base": base}
    frame["y_ticks"] = [(y.place(value), value) for value in range(0, 101, 20)]
    return render("bar_chart.svg.j2", title=title, bars=bars, groups=places, legend=legend, **frame)


def curve_style(place: int) -> tuple[str, str]:
    """Colour and SVG dash pattern of a curve, from its index in the legend."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """A centred running mean over about `share` of the points."""
    reach = max(1, round(len(points) * share / 2))
    means = []
    for k, (x, _) in enumerate(points):
        # At both ends the window is smaller, so the mean is over fewer points.
        near = [y for _, y in points[max(0, k - reach) : k + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _axis(values: Sequence[float], margin: float, start: float, end: float) -> Axis:
    """The axis of these values, with `margin` times their range free at both ends."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0)  # the range must not be zero if all values are equal
    return Axis(low - margin * span, (high if high > low else low + span) + margin * span, start, end)
