"""Where the seconds of the newest steps went, from the logged metrics of a phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.reports.drawing.charts import COLOURS
from experiments.runs import metrics_csv

# A part of a step -> its metric, in the order in which the parts follow one another. `update` is the rest.
PARTS = {
    "wait": "speed/data_wait",
    "rollout": "speed/rollout_seconds",
    "reward": "speed/reward_seconds",
    "reference": "speed/reference_seconds",
}
UPDATE = "update"
REST = "speed/update_seconds"  # all after the rollout: reward, reference and update
WHOLE = "speed/seconds_per_batch"
NEWEST = 20  # number of steps
NAMES = ("wait", "rollout", "reward", "reference", UPDATE)
COLOUR = dict(zip(NAMES, (*COLOURS[4:], *COLOURS), strict=False))


def timeline(rows: metrics_csv.Rows) -> list[dict[str, Any]]:
    """For each of the newest steps, the newest first: its number, its seconds, and its parts with their shares of the
    longest shown step. [] if no seconds are logged."""
    steps = [found for row in rows[-10 * NEWEST :] if (found := _parts(row))][-NEWEST:]
    longest = max((sum(parts.values()) for _, parts in steps), default=0.0)
    shown = []
    for step, parts in reversed(steps):
        cells = [
            {
                "name": name,
                "seconds": parts[name],
                "share": round(100 * parts[name] / longest, 2),
                "colour": COLOUR[name],
            }
            for name in NAMES
            if parts.get(name)
        ]
        shown.append({"step": step, "seconds": sum(parts.values()), "parts": cells})
    return shown


def _parts(row: Mapping[str, str]) -> tuple[int, dict[str, float]] | None:
    """(step, part -> seconds) of a row of metrics; None if it has no times."""
    known = {name: max(0.0, float(row[metric])) for name, metric in PARTS.items() if row.get(metric)}
    if row.get(REST):
        known[UPDATE] = max(0.0, float(row[REST]) - known.get("reward", 0.0) - known.get("reference", 0.0))
    elif row.get(WHOLE):  # CoT-SFT has an update alone
        known[UPDATE] = max(0.0, float(row[WHOLE]) - sum(known.values()))
    return (int(row["step"]), known) if sum(known.values()) > 0 else None
