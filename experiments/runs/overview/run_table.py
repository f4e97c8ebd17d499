"""`make runs`: one table of all runs below outputs/, and a clean-up that asks first (`make runs ARGS=--clean`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.metrics.result_files import RESULT, OtherVersion, read_result
from datamodules.persistence import folder_lock
from datamodules.persistence.durations import in_words
from experiments.runs import run_identity
from experiments.runs.commands import command
from experiments.runs.overview.clean_up import clean_up, disk_bytes, in_gigabytes
from experiments.runs.results import find_mig_bench
from experiments.runs.usage_errors import PlainParser

HEADER = ("experiment", "phase", "state", "AVG", "commit", "size", "age")
DAY = 24 * 3600


@dataclass(frozen=True)
class RunRow:
    """One run below outputs/: the folder of a phase, or a folder that was moved aside.

    Args:
        folder: outputs/<experiment>/<phase>; of a sweep that was moved aside outputs/<experiment>.
        experiment: its name.
        phase: its name; "" of a whole sweep.
        state: "finished", "running", "interrupted", "moved aside", or "evaluated": a model that was not trained here.
        average: AVG of MIG-Bench in %, as text; with the number of questions where only some were asked; "" without.
        commit: of the last attempt at training; "" without.
        size: bytes on the disk.
        changed: the time of the last change, in seconds since 1970.
    """

    folder: Path
    experiment: str
    phase: str
    state: str
    average: str
    commit: str
    size: int
    changed: float


def find_rows(outputs: Path) -> list[RunRow]:
    """All runs below the folder of all experiments, by experiment and phase."""
    return [_read_row(folder, outputs) for folder in _run_folders(outputs)]


def table_text(rows: Sequence[RunRow], now: float) -> str:
    """The rows as an aligned table, with a line of the sizes in all.

    Args:
        rows: the runs.
        now: the time to which ages are counted, in seconds since 1970.
    """
    cells = [HEADER, *(_cells(row, now) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    aside = [row for row in rows if row.state == "moved aside"]
    total = f"{len(rows)} run{'s' * (len(rows) != 1)}, {in_gigabytes(sum(row.size for row in rows))}"
    if aside:
        total += f", of which {len(aside)} moved aside, {in_gigabytes(sum(row.size for row in aside))}"
    return "\n".join([*lines, total])


def _cells(row: RunRow, now: float) -> tuple[str, ...]:
    age = now - row.changed
    aged = in_words(age) if age < 2 * DAY else f"{age / DAY:.0f} days"
    return row.experiment, row.phase, row.state, row.average, row.commit[:18], in_gigabytes(row.size), aged


def _run_folders(outputs: Path) -> Iterator[Path]:
    """The folders of all phases, and those that were moved aside."""
    for experiment in sorted(path for path in outputs.glob("*") if path.is_dir() and not path.name.startswith(".")):
        if run_identity.is_aside(experiment):  # a whole sweep
            yield experiment
            continue
        for phase in sorted(path for path in experiment.glob("*") if path.is_dir()):
            is_trained = (phase / run_identity.CONFIG).is_file()
            if is_trained or run_identity.is_aside(phase) or any(phase.glob(f"benchmarks/mig_bench*/{RESULT}")):
                yield phase


def _read_row(folder: Path, outputs: Path) -> RunRow:
    # A marker may be there without the other: a kill came between them.
    is_done = bool(run_identity.read_marker(folder))
    if run_identity.is_aside(folder):
        state = "moved aside"
    elif folder_lock.is_locked(folder):
        state = "running"
    elif is_done:
        state = "finished"
    else:
        state = "interrupted" if (folder / run_identity.CONFIG).is_file() else "evaluated"
    changed = max(path.stat().st_mtime for path in [folder, *(p for p in folder.glob("*") if p.exists())])
    commit = run_identity.trained_commit(folder) or ""
    experiment, phase = (*folder.relative_to(outputs).parts, "")[:2]
    return RunRow(folder, experiment, phase, state, _average(folder), commit, disk_bytes(folder), changed)


def _average(folder: Path) -> str:
    try:
        found = find_mig_bench(folder)
        result = read_result(found / RESULT) if found else {}
    except (OtherVersion, ValueError):
        return "unreadable"
    score = result.get("averages", {}).get("avg", {}).get("score")
    if score is None:
        return ""
    return f"{score:.2f}" if result.get("limit") is None else f"{score:.2f} of {result['n']}"


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make runs`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder that holds all experiments")
    parser.add_argument(
        "--clean", action="store_true", help="offer to delete moved-aside runs, and old checkpoints of finished runs"
    )
    parser.add_argument("--yes", action="store_true", help="with --clean: delete without a question")
    given = parser.parse_args(args)
    if given.yes and not given.clean:
        parser.error("--yes answers the question of --clean: give both")
    if not given.outputs.is_dir():
        sys.exit(f"--outputs={given.outputs}: there is no such folder, and so no run")
    rows = find_rows(given.outputs)
    print(table_text(rows, time.time()))
    if given.clean:
        clean_up([row.folder for row in rows], given.yes)


if __name__ == "__main__":
    main()
