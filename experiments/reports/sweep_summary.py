"""Write sweep.json and sweep.md of a local sweep: every trial with its settings and its value.

The table is sorted by value.

{"sweep": "nano-sweep", "method": "bayes", "metric": …, "goal": "maximize", "seed": 0, "commit": …,
 "best": {"trial": 3, "value": 44.1, "parameters": {…}, "command": "python -m …"},
 "trials": [{"trial": 0, "state": "complete", "value": …, "parameters": {…}, "points": [[20, 31.5]], "seconds": …,
             "message": "", "command": …}]}
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datamodules.persistence.files import read_json, write_atomic, write_json
from datamodules.persistence.message_text import markdown_table
from experiments.sweeps.plan import SweepPlan
from experiments.sweeps.trials import Trial

STATES = ("complete", "pruned", "failed", "running")


def write(
    folder: Path, plan: SweepPlan, trials: Sequence[Trial], commands: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write sweep.json and sweep.md.

    Args:
        folder: the sweep's folder.
        plan: the sweep.
        trials: all trials, in the order of their numbers.
        commands: the command line of each trial.
        facts: more fields of sweep.json: the seed and the commit.
    """
    rows = []
    for trial, command in zip(trials, commands, strict=True):
        fields = asdict(trial)
        rows.append({"trial": fields.pop("number"), **fields, "command": command})
    # The best trial is the first in the ranking, if it has a value. Running and failed trials have none.
    ranked = sorted(rows, key=lambda row: _rank(row, plan.maximize))
    best = ranked[0] if ranked and ranked[0]["value"] is not None else None
    kept = ("trial", "value", "parameters", "command")
    summary = {
        "sweep": plan.name,
        "method": plan.method,
        "metric": plan.metric,
        "goal": "maximize" if plan.maximize else "minimize",
        **facts,
        "best": best and {key: best[key] for key in kept},
        "trials": rows,
    }
    write_json(folder / "sweep.json", summary)
    write_atomic(folder / "sweep.md", _markdown(plan, summary, ranked))


def value_text(value: Any) -> str:
    """A value of a parameter or a trial as text; "" for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _rank(row: Mapping[str, Any], maximize: bool) -> tuple:
    """Sort key: finished trials from the best to the worst, then the others by state; ties are sorted by number."""
    value = row["value"] or 0.0
    return row["value"] is None, -value if maximize else value, STATES.index(row["state"]), row["trial"]


def _markdown(plan: SweepPlan, summary: Mapping[str, Any], ranked: Sequence[Mapping[str, Any]]) -> str:
    states, best = Counter(row["state"] for row in ranked), summary["best"]
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    minutes = sum(row["seconds"] for row in ranked) / 60
    lines = [f"# {plan.name}", "", f"{len(ranked)} trials ({counts}), method {plan.method}, seed {summary['seed']},"]
    lines += [f"commit {summary['commit']}, {minutes:.1f} minutes in all. The value is {plan.metric}.", ""]
    if best is None:
        lines += ["No trial has finished yet.", ""]
    else:
        lines += [f"Best: trial {best['trial']}, {value_text(best['value'])}. Its command:", ""]
        lines += [f"    {best['command']}", "", f"{_again_heading(plan)}:", ""]
        lines += [f"    {again_command(plan, best['parameters'])}", ""]
    return "\n".join([*lines, markdown_table(_trial_rows(plan, ranked))]) + "\n"


def page_values(folder: Path, plan: SweepPlan) -> dict[str, Any]:
    """What the page of plots shows of sweep.json beside the plots: the best trial's commands, and all trials."""
    summary = read_json(folder / "sweep.json")
    best = summary["best"]
    commands = {}
    if best:
        commands[f"Trial {best['trial']}, {plan.metric} {value_text(best['value'])}"] = best["command"]
        commands[_again_heading(plan)] = again_command(plan, best["parameters"])
    ranked = sorted(summary["trials"], key=lambda row: _rank(row, plan.maximize))
    return {"commands": commands, "trials": _trial_rows(plan, ranked)}


def again_command(plan: SweepPlan, parameters: Mapping[str, Any]) -> str:
    """The command of a longer run with the settings of a trial: its parameters, and the fixed flags of the sweep."""
    config = f"CONFIG={plan.configs[0]} " if plan.configs else ""
    flags = " ".join(map(shlex.quote, plan.flags(parameters)))
    return f'make grpo {config}ARGS="{flags}"'


def _again_heading(plan: SweepPlan) -> str:
    others = plan.configs[1:]  # such as the YAML that makes trials short
    return "The same settings in a longer run" + (f", without {' and '.join(others)}" if others else "")


def _trial_rows(plan: SweepPlan, ranked: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The trials as rows of text cells, header first."""
    table = [["trial", "state", "value", *(parameter.label for parameter in plan.varied), "minutes", "note"]]
    for row in ranked:
        settings = [value_text(row["parameters"][parameter.name]) for parameter in plan.varied]
        last = [f"{row['seconds'] / 60:.1f}", " ".join(row["message"].split())]
        table.append([str(row["trial"]), row["state"], value_text(row["value"]), *settings, *last])
    return table
