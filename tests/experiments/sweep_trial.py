"""A trial without a model: it logs a curve that its parameters decide, and saves, stops and resumes as training does.

With --die k its process kills itself in the first k attempts, with --fault it ends with an error, with --diverge
its last value is nan. With --watched it waits after each step until the sweep has seen it, so that it never ends, on a
machine however busy, before the sweep could stop it. The trial named in HOLD waits, in its first attempt, behind its
first step until it is killed or stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from datamodules.persistence import folder_lock
from datamodules.persistence.files import read_json, write_json
from experiments.runs import metrics_csv

LIMIT_SECONDS = 1200  # of every wait for another process, on a busy machine
asked: list[int] = []


def wait_for(met: Callable[[], bool]) -> None:
    """Until `met`, or until this trial is asked to stop."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (met() or asked):
        if time.monotonic() > end:
            sys.exit(f"nothing happened within {LIMIT_SECONDS} s")
        time.sleep(0.02)


def num_seen(sweep: Path, trial: str) -> int:
    """How many of a trial's values the sweep has noted."""
    lines = (sweep / "trials.jsonl").read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return sum(len(record.get("values", ())) for record in records if f"trial-{record['trial']}" == trial)


def run(given: argparse.Namespace, folder: Path) -> None:
    attempt = metrics_csv.next_attempt(folder)
    file = folder / "attempts" / str(attempt) / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("step,score,other\n")
    if given.fault:
        sys.exit(f"ValueError: height={given.height} cannot be trained")
    for step in range(read_json(folder / "state.json").get("step", 0) + 1, given.steps + 1):
        time.sleep(given.pace)
        with file.open("a") as out:
            score = given.height * step / given.steps + given.slope * step
            out.write(f"{step},{math.nan if given.diverge and step == given.steps else score},\n")
        write_json(folder / "state.json", {"step": step})
        if attempt < given.die and step == 2 + attempt:
            os.kill(os.getpid(), signal.SIGKILL)
        if given.watched:
            wait_for(lambda step=step: num_seen(folder.parent, folder.name) >= step)
        if attempt == 0 and step == 1 and os.environ.get("HOLD") == folder.name:
            wait_for(lambda: False)
        if asked:
            (folder / "stopped").touch()
            sys.exit(143)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--redo", action="store_true")  # as experiments.train takes it
    for name in ("experiment", "phase", "outputs"):
        parser.add_argument(f"--{name}")
    for name, kind, default in (("height", float, 0), ("slope", float, 0), ("pace", float, 0.1), ("steps", int, 4)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("die", "fault", "diverge", "watched"):
        parser.add_argument(f"--{name}", type=int, default=0)
    arguments = parser.parse_args()
    phase = Path(arguments.outputs) / arguments.experiment / arguments.phase
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    with folder_lock.locked(phase):
        run(arguments, phase)
