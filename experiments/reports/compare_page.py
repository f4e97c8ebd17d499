"""The page that compares runs: index.html. Its rollouts are separate files in the same folder (`rollout_pages.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from datamodules.metrics.result_files import same_questions
from experiments.reports.drawing import charts
from experiments.reports.drawing.templates import render, script_json
from experiments.reports.find_runs import Points, Run, config_differences
from experiments.reports.rollout_pages import WrittenLog

MAX_POINTS = 400  # largest number of points of a curve
# The charts that are visible at the beginning, if the runs have logged their metrics.
FIRST_CHARTS = ("reward/total", "reward/accuracy", "grpo/kl", "grpo/completion_length", "train/loss")
FIRST_CHARTS += ("speed/seconds_per_batch",)


def render_page(runs: Sequence[Run], logs: Mapping[int, WrittenLog]) -> str:
    """The whole page. `logs` maps the index of a run to the result of `write_rollouts` for rollouts/<index>/."""
    measured = [run for run in runs if run.mig_bench]
    charts, legend, thinned = _curves(runs)
    return render(
        "compare.html.j2",
        title="Comparison of " + ", ".join(dict.fromkeys(run.folder.parent.name for run in runs)),
        stages=stage_rows(measured),
        runs_table=_run_rows(measured),
        charts=charts,
        legend=legend,
        thinned=f" Curves of more than {MAX_POINTS} points are means of neighbours." if thinned else "",
        settings=config_differences(runs),
        has_rollouts=bool(logs),
        rollout_notes=[f"{runs[place].label}: {text}" for place, log in logs.items() for text in log.notes],
        data=script_json(_data(runs, measured, logs)),
    )


def stage_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Header and one row for each stage of each experiment: the mean over its seeds ± their standard deviation.

    For each seed, the gain is the difference to the stage that the model was trained from; then it is averaged.
    """
    rows = [["experiment", "stage", "seeds", "AVG", "gain", "over", "in-domain", "out-of-domain", "format %", "n"]]
    known = {run.folder: run for run in runs}
    families = list(dict.fromkeys(run.family for run in runs))
    names = [family.name for family in families]
    asked = question_sets(runs)
    for family in families:
        title = family.name if names.count(family.name) == 1 else f"{family.parent.name}/{family.name}"
        mine = [run for run in runs if run.family == family]
        for phase, questions_of in dict.fromkeys((run.phase, asked[run.folder]) for run in mine):
            seeds = [run for run in mine if (run.phase, asked[run.folder]) == (phase, questions_of)]
            columns = [[run.mig_bench[key] for run in seeds] for key in ("avg", "in_domain", "out_of_domain")]
            average, inside, outside = map(_mean_and_spread, columns)
            form = _mean_and_spread([run.mig_bench["format_rate"] for run in seeds])
            questions = ", ".join(f"{n:,}" for n in sorted({run.mig_bench["n"] for run in seeds}))
            paired = [run for run in seeds if asked.get(run.start) == questions_of]  # the same questions before
            gains = [run.mig_bench["avg"] - known[run.start].mig_bench["avg"] for run in paired]
            over = ", ".join(dict.fromkeys(run.start.name for run in paired))
            gain = _mean_and_spread(gains, signed=True)
            rows.append(
                [title, phase + questions_of, str(len(seeds)), average, gain, over, inside, outside, form, questions]
            )
    return rows


def question_sets(runs: Sequence[Run]) -> dict[Path, str]:
    """For each run's folder its set of questions as a suffix of a label; "" for all if they are the same."""
    if all(same_questions(runs[0].asked, run.asked) for run in runs):
        return {run.folder: "" for run in runs}
    sets = [[run.asked.get("data_root"), (run.asked.get("questions") or "")[:6]] for run in runs]
    return {run.folder: f" ({', '.join(filter(None, parts))})" for run, parts in zip(runs, sets, strict=True)}


def _mean_and_spread(values: Sequence[float | None], signed: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "" if signed else "–"
    text = f"{mean(known):+.2f}" if signed else f"{mean(known):.2f}"
    return text if len(known) < 2 else f"{text} ± {stdev(known):.2f}"


def _run_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Header and one row for each run."""
    rows = [["run", "seed", "commit", "AVG", "in-domain", "out-of-domain", "format %", "questions"]]
    asked = question_sets(runs)
    for run in runs:
        label = run.label + asked[run.folder]
        numbers = [_mean_and_spread([run.mig_bench[key]]) for key in ("avg", "in_domain", "out_of_domain")]
        last = [f"{run.mig_bench['format_rate']:.2f}", f"{run.mig_bench['n']:,}"]
        rows.append([label, "–" if run.seed is None else str(run.seed), run.commit, *numbers, *last])
    return rows


def _curves(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Returns a chart for each logged metric (the first ones are visible), the legend, and if a curve is thinned."""
    logged = [run for run in runs if run.curves]
    names = sorted({name for run in logged for name in run.curves})
    shown = [name for name in FIRST_CHARTS if name in names] or names[:4]
    labels = [run.label for run in runs]
    drawn = []
    for name in [*shown, *(name for name in names if name not in shown)]:
        curves = {run.label: _thin_curve(run.curves.get(name, [])) for run in logged}
        drawing = charts.line_chart(name, curves, labels)
        drawn.append({"name": name, "is_shown": name in shown, "drawing": drawing})
    legend = []
    for place, run in enumerate(runs):
        colour, dash = charts.curve_style(place)
        legend += [{"place": place, "label": run.label, "colour": colour, "dash": dash}] if run.curves else []
    return drawn, legend, any(len(points) > MAX_POINTS for run in logged for points in run.curves.values())


def _thin_curve(points: Points) -> Points:
    """Reduce a curve to at most MAX_POINTS points, each the mean of equally many neighbours."""
    size = -(-len(points) // MAX_POINTS) or 1
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [(mean(x for x, _ in piece), mean(y for _, y in piece)) for piece in pieces]


def _data(runs: Sequence[Run], measured: Sequence[Run], logs: Mapping[int, WrittenLog]) -> dict[str, Any]:
    """The values that the script of the page uses."""
    keys = ("avg", "in_domain", "out_of_domain", "tasks")
    asked = question_sets(measured)
    stages = [{"label": run.label + asked[run.folder]} | {key: run.mig_bench[key] for key in keys} for run in measured]
    return {"stages": stages, "logs": [{"name": str(place), "label": runs[place].label} for place in logs]}
