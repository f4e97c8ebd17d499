"""metrics.csv of a phase that may have been stopped and resumed several times.

Each attempt of a phase logs to its own file, attempts/<k>/metrics.jsonl. A resumed attempt repeats the steps after its
checkpoint, so its rows replace the earlier attempts' rows from its first step on. The metrics that several callbacks
log at one step become one row.
"""

from __future__ import annotations

import csv
from pathlib import Path

from datamodules.persistence.files import read_sound_lines, write_atomic

Rows = list[dict[str, str]]
ATTEMPTS, ROWS = "attempts", "metrics.jsonl"


def next_attempt(folder: Path) -> int:
    """The number of the next attempt in the phase folder."""
    return len(_attempts(folder))


def read_rows(folder: Path) -> Rows:
    """The rows of all attempts of a phase, sorted by step; [] when nothing is logged yet."""
    rows: dict[int, dict[str, str]] = {}
    for attempt in _attempts(folder):
        later = _attempt_rows(attempt)
        first = min((int(row["step"]) for row in later), default=None)
        if first is not None:
            rows = {step: row for step, row in rows.items() if step < first}
        for row in later:
            rows.setdefault(int(row["step"]), {}).update({name: value for name, value in row.items() if value})
    return [rows[step] for step in sorted(rows)]


def merge_attempts(folder: Path) -> None:
    """Write metrics.csv of the phase from all its attempts."""
    rows = read_rows(folder)
    if not rows:
        return
    names = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    lines = [names, *([row.get(name) or "" for name in names] for row in rows)]
    write_atomic(Path(folder) / "metrics.csv", "".join(",".join(line) + "\n" for line in lines))


def read_curve(rows: Rows, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, for steps at which it was logged. NaN values are skipped."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [(step, value) for step, value in points if value == value and abs(value) != float("inf")]


def _attempt_rows(attempt: Path) -> Rows:
    rows = [{name: str(value) for name, value in row.items()} for row in read_sound_lines(attempt / ROWS)]
    old = attempt / "metrics.csv"  # runs of earlier versions have no metrics.jsonl
    text = old.read_text() if old.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # the run may have been killed while it wrote its last line
    return rows + [row for row in csv.DictReader(whole.splitlines()) if row.get("step")]


def _attempts(folder: Path) -> list[Path]:
    files = [path for path in (Path(folder) / ATTEMPTS).glob("*") if path.name.isdigit()]
    return sorted(files, key=lambda path: int(path.name))
