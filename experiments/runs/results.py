"""results.json: the one small file that says what an experiment reached.

    {"experiment": "nano", "seed": 0, "commit": "1a2b3c4", "stages": [
        {"name": "base", "mig_bench": {"avg": 11.1, "in_domain": …, "out_of_domain": …, "tasks": {"diff": …},
                                       "format_rate": …, "parse_failures": {"no_box": 3}, "n": 1200}, "seconds": 61.0}]}

Accuracies and rates are percentages (0-100). `seconds` is the wall clock of the stage: its training with everything
that belongs to it (rejection sampling, merging) and its evaluation; a stage resumed after a kill counts every attempt.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datamodules.persistence.files import write_atomic

BASE = "base"  # the first stage: the model as it is given
MIG_BENCH_KEYS = ("avg", "in_domain", "out_of_domain", "tasks", "format_rate", "parse_failures", "n")


@dataclass(frozen=True)
class Stage:
    """One rung of the ladder. `mig_bench` holds exactly `MIG_BENCH_KEYS`."""

    name: str
    mig_bench: Mapping
    seconds: float


@dataclass(frozen=True)
class Results:
    """What results.json holds. `stages` stand in the order in which they ran."""

    experiment: str
    seed: int
    commit: str
    stages: tuple[Stage, ...] = ()

    def with_stage(self, stage: Stage) -> Results:
        """The same results with one more stage at the end."""
        return replace(self, stages=(*self.stages, stage))


def make_stage(name: str, summary: Mapping, seconds: float) -> Stage:
    """A stage from an evaluation's summary, which may hold more than results.json keeps.

    Raises ValueError that names every missing key.
    """
    missing = [key for key in MIG_BENCH_KEYS if key not in summary]
    if missing:
        raise ValueError(f"stage {name!r}: the MIG-Bench summary lacks {missing}, it has {sorted(summary)}")
    return Stage(name, {key: summary[key] for key in MIG_BENCH_KEYS}, round(float(seconds), 1))


def started_from(model: str) -> str:
    """The stage that left `model`: the one whose folder a merged model lies in; the first for any other."""
    return Path(model).parent.name if Path(model).name == "merged" else BASE


def read_results(path: Path) -> Results:
    """Read and check results.json; raises ValueError that names the file and what is wrong in it."""
    try:
        record = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    faults = _faults(record)
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults))
    stages = tuple(Stage(s["name"], s["mig_bench"], s["seconds"]) for s in record["stages"])
    return Results(record["experiment"], record["seed"], record["commit"], stages)


def write_results(path: Path, results: Results) -> None:
    """Write results.json as a whole or not at all."""
    record = asdict(results)
    faults = _faults(record)
    if faults:
        raise ValueError(f"refusing to write {path}: " + "; ".join(faults))
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def current_commit(folder: Path) -> str:
    """The commit of the checkout that holds `folder`, `-dirty` when tracked files differ, `unknown` outside git."""
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        run = subprocess.run(git, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else "unknown"


def _faults(record: object) -> list[str]:
    if not isinstance(record, Mapping):
        return [f"expected an object, found {type(record).__name__}"]
    types = {"experiment": str, "seed": int, "commit": str, "stages": (list, tuple)}
    wrong = [key for key, kind in types.items() if not isinstance(record.get(key), kind)]
    faults = [f"{key} is missing or of the wrong type: {record.get(key)!r:.40}" for key in wrong]
    faults += [f"unknown field {key!r}" for key in record if key not in types]
    if not faults:
        for stage in record["stages"]:
            faults += _stage_faults(stage)
        names = [stage.get("name") for stage in record["stages"] if isinstance(stage, Mapping)]
        faults += [f"stage {name!r} stands twice" for name in sorted({n for n in names if n and names.count(n) > 1})]
    return faults


def _stage_faults(stage: object) -> list[str]:
    if not isinstance(stage, Mapping) or set(stage) != {"name", "mig_bench", "seconds"}:
        return [f"a stage needs exactly name, mig_bench and seconds, found {stage!r:.80}"]
    name, bench = stage["name"], stage["mig_bench"]
    if not isinstance(bench, Mapping) or set(bench) != set(MIG_BENCH_KEYS):
        return [f"stage {name!r}: mig_bench needs exactly {list(MIG_BENCH_KEYS)}"]
    faults = []
    for key in ("avg", "in_domain", "out_of_domain", "format_rate"):
        none_asked = key.endswith("_domain") and bench[key] is None  # no task of that kind was evaluated
        if not none_asked and not _is_percentage(bench[key]):
            faults.append(f"stage {name!r}: mig_bench.{key} is {bench[key]!r}, not a percentage")
    if not isinstance(bench["tasks"], Mapping) or not bench["tasks"]:
        faults.append(f"stage {name!r}: mig_bench.tasks is empty or no object")
    else:
        wrong = {task: value for task, value in bench["tasks"].items() if not _is_percentage(value)}
        faults += [f"stage {name!r}: task {task!r} is {value!r}, not a percentage" for task, value in wrong.items()]
    if not isinstance(bench["parse_failures"], Mapping):
        faults.append(f"stage {name!r}: mig_bench.parse_failures is {bench['parse_failures']!r}, not kind -> count")
    if not isinstance(bench["n"], int) or bench["n"] < 1:
        faults.append(f"stage {name!r}: mig_bench.n is {bench['n']!r}, not a count of questions")
    return faults


def _is_percentage(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 100
