"""Drawings of a sweep in SVG: history, intermediate curves, importance, and parallel coordinates.

Whatever belongs to a trial carries data-trial, so that the page's script can pick it out in all drawings at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.reports.svg_charts import svg_text
from experiments.sweeps.plan import Parameter, SweepPlan
from experiments.sweeps.trials import Trial

BEST, PRUNED = "#c4542d", "#8a8f98"
LOW, HIGH = (196, 206, 222), (36, 82, 140)  # colours of the worst and the best finished trial
Scale = Callable[[float], float]
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 34


def history_chart(plan: SweepPlan, trials: Sequence[Trial], width: int = 568, height: int = 250) -> str:
    """Each finished trial's value by its number, and the best so far as a line."""
    done = [trial for trial in trials if trial.state == "complete"]
    if not done:
        return ""
    x = _linear(0, max(len(trials) - 1, 1), LEFT, width - RIGHT)
    y = _value_scale([t.value for t in done], height)
    best, line = None, []
    for trial in done:
        before, best = best, trial.value if best is None or plan.better(trial.value, best) else best
        if before is not None:
            line.append((x(trial.number), y(before)))
        line.append((x(trial.number), y(best)))
    line.append((x(len(trials) - 1), y(best)))
    parts = [_frame("History", width, height, f"{plan.metric}; the line is the best so far")]
    parts += _grid(y, [t.value for t in done], width) + _numbers(x, range(len(trials)), height, "trial")
    parts.append(_line(line, BEST, 1.5, "pointer-events='none'"))
    shades = shades_of(plan, trials)
    for trial in done:
        place = f'cx="{x(trial.number):.1f}" cy="{y(trial.value):.1f}"'
        parts.append(f'<circle {place} r="5" fill="{shades[trial.number]}" {_of(trial)}/>')
    return _svg(width, height, parts)


def curves_chart(plan: SweepPlan, trials: Sequence[Trial], width: int = 568, height: int = 250) -> str:
    """Intermediate values by training step, a curve for each trial; those that were stopped are dashed."""
    drawn = [trial for trial in trials if trial.points]
    if not drawn:
        return ""
    steps = [step for trial in drawn for step, _ in trial.points]
    values = [value for trial in drawn for _, value in trial.points]
    x = _linear(min(0, *steps), max(*steps, 1), LEFT, width - RIGHT)
    y = _value_scale(values, height)
    parts = [_frame("Intermediate values", width, height, f"{plan.metric} by step; dashed where stopped early")]
    parts += _grid(y, values, width) + _numbers(x, sorted(set(steps)), height, "step")
    shades = shades_of(plan, trials)
    for trial in sorted(drawn, key=lambda t: t.number == best_number(plan, trials)):
        places = [(x(step), y(value)) for step, value in trial.points]
        dash = "" if trial.state == "complete" else "stroke-dasharray='4 3'"
        parts.append(f"<g {_of(trial)}>{_line(places, shades[trial.number], 1.8, dash)}")
        end = places[-1]
        parts.append(f'<circle cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="3" fill="{shades[trial.number]}"/></g>')
    return _svg(width, height, parts)


def importance_chart(importance: Mapping[str, float], width: int = 568) -> str:
    """Bars of each parameter's share of 1."""
    height = TOP + 16 + 26 * len(importance)
    parts = [_frame("Importance of the parameters", width, height, "")]
    for k, (name, share) in enumerate(importance.items()):
        y = TOP + 8 + 26 * k
        long = share * (width - 240)
        parts.append(svg_text(164, y + 13, short(name), "end"))
        parts.append(f'<rect x="172" y="{y}" width="{max(long, 1):.1f}" height="18" rx="2" fill="#3465a4"/>')
        parts.append(svg_text(180 + long, y + 13, f"{share:.2f}"))
    return _svg(width, height, parts)


def parallel_chart(plan: SweepPlan, trials: Sequence[Trial], height: int = 340) -> str:
    """Parallel coordinates: an axis for each varied parameter and one for the metric, a line for each ended trial.

    A line carries its places on the axes, by which the script picks out what was brushed. A trial that was stopped ends
    before the axis of the metric.
    """
    drawn = [trial for trial in trials if trial.state in ("complete", "pruned")]
    axes = list(plan.varied)
    if not drawn or not axes:
        return ""
    gap = max(118, 1040 // (len(axes) + 1))
    width = gap * (len(axes) + 1)
    top, bottom = 54, height - 20
    xs = [gap / 2 + gap * k for k in range(len(axes) + 1)]
    seen = [[trial.parameters[parameter.name] for trial in drawn] for parameter in axes]
    scales = [_axis(parameter, values, top, bottom) for parameter, values in zip(axes, seen, strict=True)]
    values = [trial.value for trial in drawn if trial.value is not None]
    metric_scale, metric_ticks = _number_axis(values or [0.0], top, bottom)
    shades, parts = shades_of(plan, trials), []
    for trial in sorted(drawn, key=lambda t: (t.value is not None, t.number == best_number(plan, trials))):
        ys = [scale(trial.parameters[p.name]) for p, (scale, _) in zip(axes, scales, strict=True)]
        ys += [] if trial.value is None else [metric_scale(trial.value)]
        places = list(zip(xs, ys, strict=False))
        data = f'{_of(trial)} data-ys="{" ".join(f"{y:.1f}" for y in ys)}"'
        dash = "" if trial.state == "complete" else "stroke-dasharray='4 3'"
        parts.append(f"<g class='line' {data}>{_line(places, 'transparent', 12)}")
        parts.append(f"{_line(places, shades[trial.number], 2, dash)}</g>")
    titles = [short(p.name) for p in axes] + [plan.metric]
    for k, (x, title) in enumerate(zip(xs, titles, strict=True)):
        ticks = scales[k][1] if k < len(axes) else metric_ticks
        parts.append(f'<g class="axis" data-axis="{k}" data-x="{x:.1f}">')
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#666"/>')
        parts.append(svg_text(x, 22, title, "middle", bold=True))
        note = "log scale" if k < len(axes) and _is_log(axes[k], seen[k]) else ""
        parts.append(svg_text(x, 38, note, "middle", "#888"))
        for place, label in ticks:
            parts.append(f'<line x1="{x - 4:.1f}" x2="{x:.1f}" y1="{place:.1f}" y2="{place:.1f}" stroke="#666"/>')
            parts.append(f"<g class='label'>{svg_text(x - 7, place + 4, label, 'end')}</g>")
        handle = f'x="{x - 14:.1f}" y="{top - 6}" width="28" height="{bottom - top + 12}"'
        parts.append(f'<rect class="handle" {handle} fill="transparent"/>')
        parts.append(f'<rect class="brush" x="{x - 9:.1f}" width="18"/>')
        parts.append("</g>")
    return _svg(width, height, [f'<rect width="{width}" height="{height}" class="paper"/>', *parts], "parallel")


def shades_of(plan: SweepPlan, trials: Sequence[Trial]) -> dict[int, str]:
    """A colour for each trial: from light for the worst to dark for the better, and one of its own for the best."""
    values = [trial.value for trial in trials if trial.value is not None]
    best = best_number(plan, trials)
    shades = {}
    for trial in trials:
        if trial.value is None:
            shades[trial.number] = PRUNED
        else:
            share = (trial.value - min(values)) / ((max(values) - min(values)) or 1.0)
            share = share if plan.maximize else 1 - share
            mixed = [round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True)]
            shades[trial.number] = BEST if trial.number == best else "#" + "".join(f"{part:02x}" for part in mixed)
    return shades


def best_number(plan: SweepPlan, trials: Sequence[Trial]) -> int | None:
    """The number of the best finished trial, the first of equals; None where none has finished."""
    done = [trial for trial in trials if trial.value is not None]
    sign = 1 if plan.maximize else -1
    return max(done, key=lambda trial: (sign * trial.value, -trial.number)).number if done else None


def short(name: str) -> str:
    """A flag without the words that most of them begin with."""
    return name.removeprefix("model.init_args.")


def _is_log(parameter: Parameter, seen: Sequence[Any]) -> bool:
    """Whether its axis is logarithmic: not where a value was rounded to 0."""
    return parameter.log and min(seen) > 0


def _axis(parameter: Parameter, seen: Sequence[Any], top: float, bottom: float) -> tuple[Callable, list]:
    """(value -> y, ticks) of a parameter's axis: choices at even distances, numbers by their scale."""
    if parameter.choices:
        names = list(dict.fromkeys(map(str, parameter.choices)))
        even = _linear(-0.5, len(names) - 0.5, bottom, top)
        return lambda value: even(names.index(str(value))), [(even(k), name) for k, name in enumerate(names)]
    if _is_log(parameter, seen):
        scale, _ = _number_axis([math.log10(value) for value in seen], top, bottom)
        values = [math.log10(value) for value in seen]
        decades = list(range(math.ceil(min(values)), math.floor(max(values)) + 1))
        ends = [end for end in (min(values), max(values)) if all(abs(end - at) > 0.15 for at in decades)]
        ticks = [(scale(at), f"{10**at:.2g}") for at in dict.fromkeys([*decades, *ends])]
        return lambda value: scale(math.log10(value)), ticks
    return _number_axis([float(value) for value in seen], top, bottom)


def _number_axis(values: Sequence[float], top: float, bottom: float) -> tuple[Scale, list[tuple[float, str]]]:
    low, high = min(values), max(values)
    scale = _linear(low, high if high > low else low + 1, bottom, top)
    return scale, [(scale(at), f"{at:.3g}") for at in _ticks(low, high)]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    return [low] if high <= low else [low + k / (count - 1) * (high - low) for k in range(count)]


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _value_scale(values: Sequence[float], height: int) -> Scale:
    spare = 0.08 * (max(values) - min(values)) or 0.5
    return _linear(min(values) - spare, max(values) + spare, height - BOTTOM, TOP + 16)


def _grid(y: Scale, values: Sequence[float], width: int) -> list[str]:
    parts = []
    for at in _ticks(min(values), max(values)):
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}" class="grid"/>')
        parts.append(svg_text(LEFT - 6, y(at) + 4, f"{at:.3g}", "end"))
    return parts


def _numbers(x: Scale, at: Sequence[int], height: int, what: str) -> list[str]:
    """Whole numbers below a drawing, no more than fit."""
    shown = list(at)[:: max(1, math.ceil(len(at) / 12))]
    return [svg_text(x(number), height - 16, str(number), "middle") for number in shown] + [
        svg_text(LEFT, height - 3, what, colour="#888")
    ]


def _of(trial: Trial) -> str:
    return f'data-trial="{trial.number}"'


def _line(places: Sequence[tuple[float, float]], colour: str, wide: float, more: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{wide}" {more}/>'


def _frame(title: str, width: int, height: int, note: str) -> str:
    paper = f'<rect width="{width}" height="{height}" class="paper"/>'
    return paper + svg_text(14, 19, title, bold=True) + svg_text(width - RIGHT, 19, note, "end", "#888")


def _svg(width: float, height: float, parts: Sequence[str], name: str = "") -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    named = f' id="{name}"' if name else ""
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}{named}>{"".join(parts)}</svg>'
