"""Small SVG charts for the report: pure functions from numbers to markup, no script and no outside file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#3465a4", "#c4542d", "#4e8a2e", "#8257a8", "#b08a1e", "#2f8f8f")
DASHES = ("none", "6 3", "2 3")
Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 30  # margins for the axis labels and the title


def line_chart(title: str, curves: Mapping[str, Points], legend: Sequence[str] | None = None) -> str:
    """Curves over training steps. `curves` maps a legend to its (step, value) points; empty curves are left out.

    `legend`: names in the order of a legend that the page shows itself, for many charts of the same curves. A curve has
    the colour of its place there, `curve_style`, and lies in <g data-curve="place">.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    x_range, y_range = _widen(min(xs), max(xs), 0.0), _widen(min(ys), max(ys), 0.05)
    parts = [_frame(title), *_axes(x_range, y_range)]
    for place, (name, points) in enumerate(curves.items()):
        k = place if legend is None else legend.index(name)
        colour, dash = curve_style(k)
        parts.append(f'<g data-curve="{k}" stroke-dasharray="{dash}">')
        if len(points) > 20:
            parts.append(_polyline(points, x_range, y_range, colour, opacity=0.25))
            points = smooth(points)
        parts.append(_polyline(points, x_range, y_range, colour) + "</g>")
        if legend is None:
            parts.append(svg_text(WIDTH - RIGHT, TOP + 14 * (k + 1) - 2, name, anchor="end", colour=colour))
    return _svg(WIDTH, HEIGHT, parts)


def bar_chart(title: str, groups: Sequence[str], series: Mapping[str, Mapping[str, float]]) -> str:
    """Grouped bars of percentages (0-100): one group for each of `groups`, in it one bar for each of `series`.

    A series without a value for a group has a gap there.
    """
    step, bar = 16 * len(series) + 14, 14
    width = max(WIDTH, LEFT + RIGHT + step * len(groups), LEFT + sum(max(90, 7 * len(name) + 20) for name in series))
    height, base = 300, 210
    parts = [_frame(title, width, height)]
    for tick in range(0, 101, 20):
        y = base - tick / 100 * (base - TOP - 16)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(svg_text(LEFT - 5, y + 4, str(tick), anchor="end"))
    for g, group in enumerate(groups):
        x = LEFT + g * step + 6
        for k, values in enumerate(series.values()):
            if group not in values:
                continue
            value = min(max(values[group], 0.0), 100.0)
            tall = value / 100 * (base - TOP - 16)
            parts.append(
                f'<rect x="{x + k * 16}" y="{base - tall:.1f}" width="{bar}" height="{tall:.1f}"'
                f' fill="{COLOURS[k % len(COLOURS)]}"><title>{escape(group)}: {value:.1f}</title></rect>'
            )
        parts.append(
            f'<text transform="translate({x + 8 * len(series)},{base + 12}) rotate(35)">{escape(group)}</text>'
        )
    x = LEFT
    for k, name in enumerate(series):
        parts.append(svg_text(x, height - 6, "■ " + name, colour=COLOURS[k % len(COLOURS)]))
        x += max(90, 7 * len(name) + 20)
    return _svg(width, height, parts)


def curve_style(place: int) -> tuple[str, str]:
    """Colour and SVG dash pattern of the curve at a place in the legend."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """A centred running mean over about `share` of the points."""
    reach = max(1, round(len(points) * share / 2))
    means = []
    for k, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, k - reach) : k + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _widen(low: float, high: float, margin: float) -> tuple[float, float]:
    span = (high - low) or max(abs(high), 1.0)
    return low - margin * span, (high if high > low else low + span) + margin * span


def _place(x: float, y: float, x_range: tuple[float, float], y_range: tuple[float, float]) -> tuple[float, float]:
    across = (x - x_range[0]) / (x_range[1] - x_range[0])
    up = (y - y_range[0]) / (y_range[1] - y_range[0])
    return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _polyline(
    points: Points, x_range: tuple[float, float], y_range: tuple[float, float], colour: str, opacity: float = 1.0
) -> str:
    places = [_place(x, y, x_range, y_range) for x, y in points]
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="{opacity}"/>'


def _axes(x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    parts = []
    for k in range(5):
        y_value = y_range[0] + k / 4 * (y_range[1] - y_range[0])
        _, y = _place(x_range[0], y_value, x_range, y_range)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(svg_text(LEFT - 5, y + 4, f"{y_value:.3g}", anchor="end"))
        x_value = x_range[0] + k / 4 * (x_range[1] - x_range[0])
        x, _ = _place(x_value, y_range[0], x_range, y_range)
        parts.append(svg_text(x, HEIGHT - BOTTOM + 16, f"{x_value:.0f}", anchor="middle" if k < 4 else "end"))
    return parts


def _frame(title: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return f'<rect width="{width}" height="{height}" class="paper"/>' + svg_text(LEFT, 16, title, bold=True)


def svg_text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#444", bold: bool = False) -> str:
    """A text at a place, escaped."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        + "".join(parts)
        + "</svg>"
    )
