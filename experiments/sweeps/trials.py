"""The trials of a local sweep: their journal, which stays valid after a kill, and the process of a trial.

<sweep>/trials.jsonl   {"trial": 0, "parameters": {…}}                      before the trial starts
                       {"trial": 0, "values": [[20, 31.5]], "seconds": 41}  as (step, value) are logged
                       {"trial": 0, "state": "complete", "value": 33.1, "seconds": 71, "message": ""}
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.persistence.durations import Outlook
from datamodules.persistence.files import Journal
from datamodules.persistence.progress_lines import EVERY_SECONDS
from experiments.runs import metrics_csv
from experiments.runs.subprocess_steps import ROOT, say
from experiments.runs.wandb_runs import child_environment, with_given_tags

POLL_SECONDS = 1.0
TRIAL = "trial"  # its lines of progress begin with "[trial 3 of 24]"
STOP_SECONDS = 300.0  # a trial that is asked to stop finishes its batch and writes a checkpoint
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Trial:
    """One trial. `state` is "running", "complete", "pruned" or "failed"; `seconds` count all attempts."""

    number: int
    parameters: dict[str, Any]
    points: tuple[tuple[int, float], ...] = ()
    state: str = "running"
    value: float | None = None
    seconds: float = 0.0
    message: str = ""


class TrialLog:
    """The trials of one sweep, in the order of their numbers, stored in `path`. `key` is the hash of the sweep;
    `is_ours` as in `Journal`."""

    def __init__(self, path: Path, key: str, is_ours: bool = False) -> None:
        self._journal = Journal(path, key, is_ours)
        self.trials: list[Trial] = []
        for record in self._journal.records:
            self._apply(record)

    def begin(self, parameters: dict[str, Any]) -> Trial:
        return self._write({"trial": len(self.trials), "parameters": parameters})

    def reopen(self, number: int) -> Trial:
        return self._write({"trial": number, "state": "running", "value": None, "message": ""})

    def add_points(self, number: int, points: Points, seconds: float) -> Trial:
        return self._write({"trial": number, "values": points, "seconds": round(seconds, 1)})

    def end(self, number: int, state: str, seconds: float, value: float | None = None, message: str = "") -> Trial:
        record = {"trial": number, "state": state, "value": value, "seconds": round(seconds, 1), "message": message}
        return self._write(record)

    def _write(self, record: dict[str, Any]) -> Trial:
        self._journal.append([record])
        return self._apply(record)

    def _apply(self, record: dict[str, Any]) -> Trial:
        number = record["trial"]
        if "parameters" in record:
            self.trials.append(Trial(number, record["parameters"]))
        changes = {key: record[key] for key in ("state", "value", "seconds", "message") if key in record}
        points = (*self.trials[number].points, *map(tuple, record.get("values", ())))
        self.trials[number] = replace(self.trials[number], points=points, **changes)
        return self.trials[number]


class Interrupted(Exception):
    """The sweep was asked to stop while a trial ran; the trial has written a checkpoint."""


@dataclass(frozen=True)
class Ended:
    """How a trial's process ended: its exit code (negative: a signal), and whether it was stopped early."""

    code: int
    pruned: bool
    seconds: float


def run_process(
    command: Sequence[str],
    environment: dict[str, str],
    log: Path,
    read_points: Callable[[], Points],
    see: Callable[[Points, float], bool],
) -> Ended:
    """Run a trial to its end.

    A trial is stopped by SIGTERM and saves a checkpoint then. SIGTERM and Ctrl-C of this process stop it too. If this
    process is killed, the trial's process continues; a process that is started later waits for the lock of the trial's
    folder.

    Args:
        command: the trial's command line.
        environment: all variables of its process.
        log: the file for its output.
        read_points: reads the (step, value) points that the trial has logged.
        see: called with the points and the elapsed seconds at each new point; returning True stops the trial.

    Raises Interrupted if this process was asked to stop.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start, seen, asked = time.monotonic(), 0, []  # `asked`: the signals that this process has got
    with log.open("a") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        # The trial has its own process group, so that Ctrl-C reaches it only once, through the handler below.
        child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    old = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    pruned, before, last_line = False, read_points(), time.monotonic()
    try:
        while (code := child.poll()) is None and not pruned and not asked:
            now = read_points()
            points, before = points_agreed(before, now), now
            if len(points) > seen:
                seen = len(points)
                pruned = see(points, time.monotonic() - start)
            if time.monotonic() - last_line >= EVERY_SECONDS:
                last_line = time.monotonic()
                if line := last_progress(log):
                    say(line)
            time.sleep(0 if pruned else POLL_SECONDS)
        if code is None:
            code = _stop(child)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted(signal.Signals(asked[0]).name)
    return Ended(code, pruned, time.monotonic() - start)


def last_progress(log: Path) -> str:
    """The last line of a trial's progress in its log; "" before there is one."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.startswith(f"[{TRIAL} ")), "")


def points_agreed(one: Points, other: Points) -> Points:
    """The common first points of two readings of a file, because the file may be rewritten during the second."""
    same = next((k for k, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return other[: min(len(one), len(other)) if same is None else same]


def logged_points(folder: Path, metric: str) -> Points:
    """(step, value) points of the metric that the phase in this folder has logged; [] before anything is logged."""
    return metrics_csv.read_curve(metrics_csv.read_rows(folder), metric)


def last_value(folder: Path, metric: str) -> float | None:
    """The last logged value of the metric, finite or not; None if it was never logged."""
    values = [row[metric] for row in metrics_csv.read_rows(folder) if row.get(metric)]
    return float(values[-1]) if values else None


def last_words(log: Path, limit: int = 300) -> str:
    """The last informative line of a log: the error, if a trial has failed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.is_file() else []
    telling = [line for line in lines if line and not line.startswith(("wandb:", "warn"))]
    errors = [line for line in telling if "Error" in line.split(":")[0] or line.startswith("- ")]
    return (errors or telling or ["it said nothing"])[-1][:limit]


def trial_environment(tags: Iterable[str], outlook: Outlook) -> dict[str, str]:
    """The environment of a trial's process. It tells W&B that the phase is a trial."""
    names = {"WANDB_JOB_TYPE": "trial", "WANDB_TAGS": ",".join(with_given_tags(*tags))}
    return child_environment() | names | outlook.environment()


def trial_outlook(trials: Sequence[Trial], number: int, total: int) -> Outlook:
    """The outlook of trial `number` (from 0) of `total`: further trials take the mean time of those that have ended.

    Before any has ended, they take as long as this one.
    """
    ended = [trial.seconds for trial in trials if trial.state != "running"]
    stage, more = f"{TRIAL} {number + 1} of {total}", total - len(ended) - 1
    if not ended:
        return Outlook(stage, time.time(), later=0.0, alike=more)
    each = sum(ended) / len(ended)
    return Outlook(stage, time.time(), each, later=more * each, evidence=sum(ended))


def _stop(child: subprocess.Popen) -> int:
    child.terminate()
    try:
        return child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return child.wait()
