"""sweep.html and sweep.json of a local sweep: best trial, all trials, what the parameters did. One file, opens offline.

{"sweep": "nano-sweep", "method": "bayes", "metric": …, "goal": "maximize", "seed": 0, "commit": …,
 "best": {"trial": 3, "value": 44.1, "parameters": {…}, "command": "python -m …"},
 "importance": {"method": "PED-ANOVA", "shares": {…}},
 "trials": [{"trial": 0, "state": "complete", "value": …, "parameters": {…}, "points": [[20, 31.5]], "seconds": …,
             "message": "", "command": …}]}
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from datamodules.persistence.files import write_atomic, write_json
from experiments.reports import pipeline_report, sweep_charts
from experiments.reports.sweep_charts import short
from experiments.sweeps.plan import SweepPlan
from experiments.sweeps.study import FEWEST_FOR_IMPORTANCE, IMPORTANCE, num_best
from experiments.sweeps.trials import Trial

PAGES = Path(__file__).parent / "pages"
SCRIPT, STYLE = PAGES / "sweep.js", PAGES / "sweep.css"
STATES = ("complete", "pruned", "failed", "running")
FEW = 30  # below so many finished trials the page says what importance cannot tell


def write(
    folder: Path,
    plan: SweepPlan,
    trials: Sequence[Trial],
    commands: Sequence[str],
    importance: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """Write <folder>/sweep.json and sweep.html. `commands` are the trials' own; `facts` the seed and the commit."""
    summary = summarise(plan, trials, commands, importance, facts)
    write_json(folder / "sweep.json", summary)
    write_atomic(folder / "sweep.html", render(plan, trials, summary))


def summarise(
    plan: SweepPlan,
    trials: Sequence[Trial],
    commands: Sequence[str],
    importance: Mapping[str, float],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What sweep.json holds."""
    rows = [
        {
            "trial": trial.number,
            "state": trial.state,
            "value": trial.value,
            "parameters": trial.parameters,
            "points": [list(point) for point in trial.points],
            "seconds": trial.seconds,
            "message": trial.message,
            "command": command,
        }
        for trial, command in zip(trials, commands, strict=True)
    ]
    best = sweep_charts.best_number(plan, trials)
    kept = ("trial", "value", "parameters", "command")
    return {
        "sweep": plan.name,
        "method": plan.method,
        "metric": plan.metric,
        "goal": "maximize" if plan.maximize else "minimize",
        **facts,
        "best": None if best is None else {key: rows[best][key] for key in kept},
        "importance": {"method": IMPORTANCE, "shares": dict(importance)},
        "trials": rows,
    }


def render(plan: SweepPlan, trials: Sequence[Trial], summary: Mapping[str, Any]) -> str:
    """The page as HTML."""
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    lead = f"{len(trials)} trials ({counts}), method {plan.method}, seed {summary['seed']}, commit {summary['commit']}"
    lead += f"; {sum(trial.seconds for trial in trials) / 60:.1f} minutes in all"
    shares, tips = summary["importance"]["shares"], [_tip(plan, trial) for trial in trials]
    body = [
        f"<h1>{escape(plan.name)}</h1><p class=lead>{escape(lead)}.</p>",
        _best(plan, summary["best"]),
        "<h2>Parallel coordinates</h2><p class=note>Point at a line to see its trial everywhere, click to keep it. Drag"
        " along an axis to keep the trials in that range; click the axis to let go. Dashed trials were stopped early."
        " <span id=brushed></span></p>",
        f"<div class=scroll>{sweep_charts.parallel_chart(plan, trials)}</div>",
        "<h2>Course</h2><div class=drawings>",
        sweep_charts.history_chart(plan, trials) + sweep_charts.curves_chart(plan, trials) + "</div>",
        "<h2>Importance</h2><div class=drawings>",
        sweep_charts.importance_chart(shares) if shares else "",
        f"<p class=note>{escape(importance_note(states['complete'], bool(shares)))}</p></div>",
        "<h2>Trials</h2>",
        f"<div class=scroll>{_table(plan, trials, summary['best'])}</div>",
        "<div id=tip hidden></div>",
        f'<script type="application/json" id=trials>{pipeline_report.script_json(tips)}</script>',
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
    ]
    style = pipeline_report.STYLE + STYLE.read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(plan.name)}: sweep</title><style>{style}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def importance_note(num_finished: int, is_shown: bool) -> str:
    """What importance means, and what it cannot say with so few trials."""
    if not is_shown:
        return f"Importance needs at least {FEWEST_FOR_IMPORTANCE} finished trials with different values."
    note = f"{IMPORTANCE}: how far the settings of the best {num_best(num_finished)} trials differ from those of all"
    note += f" {num_finished} finished ones, for each parameter by itself, as shares of 1. It says neither in which"
    note += " direction nor what parameters do together, and trials that were stopped early are left out."
    if num_finished < FEW:
        note += f" With fewer than {FEW} finished trials the shares are a hint where to look, not a result: another"
        note += " seed may order them differently."
    return note


def _best(plan: SweepPlan, best: Mapping[str, Any] | None) -> str:
    if best is None:
        return "<p class=best>No trial has finished yet.</p>"
    pairs = "".join(
        f"<div><dt>{escape(short(name))}</dt><dd>{escape(in_words(value))}</dd></div>"
        for name, value in best["parameters"].items()
    )
    config = f"CONFIG={plan.configs[0]} " if plan.configs else ""
    flags = " ".join(shlex.quote(f"--{name}={value}") for name, value in best["parameters"].items())
    longer = f'make grpo {config}ARGS="{flags}"'
    return (
        f"<div class=best>Best: trial {best['trial']}, {escape(plan.metric)} <b>{best['value']:.4g}</b><dl>{pairs}</dl>"
        f"<pre id=command>{escape(best['command'])}</pre><button data-copy=command>copy</button>"
        f"<p class=note>The same settings in a longer run:</p><pre>{escape(longer)}</pre></div>"
    )


def _table(plan: SweepPlan, trials: Sequence[Trial], best: Mapping[str, Any] | None) -> str:
    names = [parameter.name for parameter in plan.varied]
    heads = ["trial", "state", plan.metric, *map(short, names), "minutes", "note"]
    rows = []
    for trial in trials:
        settings = [trial.parameters[name] for name in names]
        cells = [
            f"<td>{trial.number}</td><td class=text>{trial.state}</td>",
            f'<td data-value="{"" if trial.value is None else trial.value}">{in_words(trial.value)}</td>',
            *(f'<td data-value="{escape(str(value))}">{escape(in_words(value))}</td>' for value in settings),
            f"<td>{trial.seconds / 60:.1f}</td><td class=text>{escape(trial.message)}</td>",
        ]
        kind = " class=best-row" if best and best["trial"] == trial.number else ""
        rows.append(f'<tr data-trial="{trial.number}"{kind}>{"".join(cells)}</tr>')
    head = "".join(f"<th{' class=text' * (name in ('state', 'note'))}>{escape(name)}</th>" for name in heads)
    return f"<table id=table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _tip(plan: SweepPlan, trial: Trial) -> str:
    pairs = [f"{short(p.name)}: {in_words(trial.parameters[p.name])}" for p in plan.varied]
    value = trial.state if trial.value is None else f"{plan.metric}: {trial.value:.4g}"
    return "\n".join([f"trial {trial.number}", value, *pairs])


def in_words(value: Any) -> str:
    """A parameter's or a trial's value to be read; "" for none."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
