"""The page that compares runs: index.html, of which rollouts are files beside it (`rollout_pages.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.reports import svg_charts
from experiments.reports.find_runs import Points, Run, config_differences
from experiments.reports.pipeline_report import html_table, script_json
from experiments.reports.rollout_pages import WrittenLog

PAGES = Path(__file__).parent / "pages"
MAX_POINTS = 400  # of one curve
# Charts that are shown at first, of those that the runs logged.
FIRST_CHARTS = ("reward/total", "reward/accuracy", "grpo/kl", "grpo/completion_length", "train/loss")
FIRST_CHARTS += ("speed/seconds_per_batch",)


def render_page(runs: Sequence[Run], logs: Mapping[int, WrittenLog]) -> str:
    """The whole page. `logs`: by a run's place, what `write_rollouts` wrote to rollouts/<place>/."""
    title = "Comparison of " + ", ".join(dict.fromkeys(run.folder.parent.name for run in runs))
    measured = [run for run in runs if run.mig_bench]
    body = [
        f"<header><h1>{escape(title)}</h1><nav>{_links()}</nav></header><main>",
        _section("ladder", "Ladder", _ladder(measured)),
        _section("tasks", "Accuracy by task", _tasks(measured)),
        _section("curves", "Curves", _curves(runs)),
        _section("settings", "Settings that differ", _settings(runs)),
        _section("rollouts", "Rollouts", _rollouts(runs, logs)),
        "</main>",
        f'<script type="application/json" id="data">{script_json(_data(runs, measured, logs))}</script>',
        f"<script>{(PAGES / 'compare.js').read_text(encoding='utf-8')}</script>",
    ]
    style = (PAGES / "compare.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def ladder_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Header and one row for each stage of each experiment: means over its seeds, ± the standard deviation of them.

    The gain is the mean over the seeds of what each won over the stage, of its own seed, that it was trained from.
    """
    rows = [["experiment", "stage", "seeds", "AVG", "gain", "over", "in-domain", "out-of-domain", "format %", "n"]]
    known = {run.folder: run for run in runs}
    families = list(dict.fromkeys(run.family for run in runs))
    names = [family.name for family in families]
    for family in families:
        title = family.name if names.count(family.name) == 1 else f"{family.parent.name}/{family.name}"
        mine = [run for run in runs if run.family == family]
        for phase in dict.fromkeys(run.phase for run in mine):
            seeds = [run for run in mine if run.phase == phase]
            columns = [[run.mig_bench[key] for run in seeds] for key in ("avg", "in_domain", "out_of_domain")]
            average, inside, outside = map(_mean_and_spread, columns)
            form = _mean_and_spread([run.mig_bench["format_rate"] for run in seeds])
            questions = ", ".join(f"{n:,}" for n in sorted({run.mig_bench["n"] for run in seeds}))
            gains = [r.mig_bench["avg"] - known[r.start].mig_bench["avg"] for r in seeds if r.start in known]
            over = ", ".join(dict.fromkeys(run.start.name for run in seeds if run.start in known))
            gain = _mean_and_spread(gains, signed=True)
            rows.append([title, phase, str(len(seeds)), average, gain, over, inside, outside, form, questions])
    return rows


def _mean_and_spread(values: Sequence[float | None], signed: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "" if signed else "–"
    text = f"{mean(known):+.2f}" if signed else f"{mean(known):.2f}"
    return text if len(known) < 2 else f"{text} ± {stdev(known):.2f}"


def _links() -> str:
    names = {"ladder": "Ladder", "tasks": "Tasks", "curves": "Curves", "settings": "Settings", "rollouts": "Rollouts"}
    return "".join(f'<a href="#{name}">{text}</a>' for name, text in names.items())


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _empty(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _ladder(runs: Sequence[Run]) -> str:
    if not runs:
        return _empty("No run was evaluated on MIG-Bench.")
    note = (
        "MIG-Bench, Acc@0.5 in percent; AVG is the mean over the tasks. Several seeds: mean ± standard deviation. "
        "The gain is that over the stage that it was trained from, seed by seed."
    )
    each = [["run", "seed", "commit", "AVG", "in-domain", "out-of-domain", "format %", "questions"]]
    for run in runs:
        numbers = [_mean_and_spread([run.mig_bench[key]]) for key in ("avg", "in_domain", "out_of_domain")]
        last = [f"{run.mig_bench['format_rate']:.2f}", f"{run.mig_bench['n']:,}"]
        each.append([run.label, "–" if run.seed is None else str(run.seed), run.commit, *numbers, *last])
    details = f"<details><summary>Each run</summary>{_wide(html_table(each))}</details>"
    return _empty(note) + _wide(html_table(ladder_rows(runs))) + details


def _tasks(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return _empty("Two evaluated runs are needed to compare tasks.")
    return (
        '<p class="controls"><label>from <select id="delta-from"></select></label>'
        '<label>to <select id="delta-to"></select></label></p><div id="deltas"></div>'
    )


def _curves(runs: Sequence[Run]) -> str:
    logged = [run for run in runs if run.curves]
    if not logged:
        return _empty("No run logged anything.")
    names = sorted({name for run in logged for name in run.curves})
    shown = [name for name in FIRST_CHARTS if name in names] or names[:4]
    names = [*shown, *(name for name in names if name not in shown)]
    legend = [run.label for run in runs]
    entries = []
    for place, run in enumerate(runs):
        if run.curves:
            colour, dash = svg_charts.curve_style(place)
            line = f'<svg width="26" height="10"><line x1="1" x2="25" y1="5" y2="5" stroke="{colour}"'
            line += f' stroke-width="3" stroke-dasharray="{dash}"/></svg>'
            box = f'<input type="checkbox" checked data-run="{place}">'
            entries.append(f"<label>{box}{line}{escape(run.label)}</label>")
    pills = "".join(_metric_pill(name, name in shown) for name in names)
    drawn = []
    for name in names:
        curves = {run.label: _thin_curve(run.curves.get(name, [])) for run in logged}
        hidden = "" if name in shown else " hidden"
        chart = svg_charts.line_chart(name, curves, legend)
        drawn.append(f'<figure data-metric="{escape(name)}"{hidden}>{chart}</figure>')
    note = "x: training step. Thin lines: as logged; strong lines: running mean. docs/metrics.md defines each metric."
    if any(len(points) > MAX_POINTS for run in logged for points in run.curves.values()):
        note += f" Curves of more than {MAX_POINTS} points are means of neighbours."
    return (
        f'<p class="legend">{"".join(entries)}</p><details id="metrics"><summary>Choose metrics '
        f"({len(names)})</summary><p>{pills}</p></details>"
        f'<div class="charts">{"".join(drawn)}</div>{_empty(note)}'
    )


def _metric_pill(name: str, checked: bool) -> str:
    state = " checked" if checked else ""
    return f'<label class="pill"><input type="checkbox" data-chart="{escape(name)}"{state}>{escape(name)}</label>'


def _thin_curve(points: Points) -> Points:
    """At most MAX_POINTS points: means of as many neighbours as it takes."""
    size = -(-len(points) // MAX_POINTS) or 1
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [(mean(x for x, _ in piece), mean(y for _, y in piece)) for piece in pieces]


def _settings(runs: Sequence[Run]) -> str:
    tables = config_differences(runs)
    if not tables:
        return _empty("Two trained runs of the same phase are needed to compare settings.")
    parts = []
    for phase, rows in tables.items():
        parts.append(f"<h3>{escape(phase)}</h3>")
        parts.append(_wide(html_table(rows), "settings") if len(rows) > 1 else _empty("No field differs."))
    return "".join(parts)


def _rollouts(runs: Sequence[Run], logs: Mapping[int, WrittenLog]) -> str:
    if not logs:
        return _empty("No run has a rollout log (model.rollout_log).")
    notes = [_empty(f"{runs[place].label}: {note}") for place, log in logs.items() for note in log.notes]
    return (PAGES / "rollouts.html").read_text(encoding="utf-8").replace("<!-- notes -->", "".join(notes))


def _wide(table: str, kind: str = "") -> str:
    return f'<div class="scroll {kind}">{table}</div>'


def _data(runs: Sequence[Run], measured: Sequence[Run], logs: Mapping[int, WrittenLog]) -> dict[str, Any]:
    """What the page's script works on."""
    keys = ("avg", "in_domain", "out_of_domain", "tasks")
    stages = [{"label": run.label} | {key: run.mig_bench[key] for key in keys} for run in measured]
    return {"stages": stages, "logs": [{"name": str(place), "label": runs[place].label} for place in logs]}
