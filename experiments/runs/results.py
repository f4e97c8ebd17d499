"""Read and write results.json, the summary of an experiment, and read a phase's result of MIG-Bench.

    {"version": 2, "experiment": "nano", "seed": 0, "commit": "1a2b3c4", "stages": [
        {"name": "base", "mig_bench": {"avg": 11.1, "in_domain": …, "out_of_domain": …, "tasks": {"diff": …},
                                       "format_rate": …, "parse_failures": {"no_box": 3}, "n": 1200}, "seconds": 61.0}]}

Accuracies and rates are percentages (0-100). `seconds` is the wall clock of the stage: training (including rejection
sampling and merging) and evaluation. If a stage was resumed, all attempts count.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.metrics.result_files import RESULT, OtherVersion, read_result, result_folder
from datamodules.persistence.files import read_json, write_atomic

BASE = "base"  # the first stage: the given model
EVALUATION = "evaluation.json"  # file beside results with the code, command and machine of their evaluation
VERSION = 2  # files of version 1 do not name theirs


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    `mig_bench` holds "avg", "in_domain", "out_of_domain", "tasks", "format_rate", "parse_failures" and "n"; an average
    is None if none of its tasks was measured.
    """

    name: str
    mig_bench: Mapping
    seconds: float


@dataclass(frozen=True)
class Results:
    """The content of results.json. `stages` are in the order in which they ran."""

    experiment: str
    seed: int
    commit: str
    stages: tuple[Stage, ...] = ()


def make_stage(name: str, result: Mapping[str, Any], seconds: float) -> Stage:
    """A stage from its result of MIG-Bench (datamodules/metrics/result_files.py)."""
    averages = {key: result["averages"].get(key, {}).get("score") for key in ("avg", "in_domain", "out_of_domain")}
    tasks = {task: cell["score"] for task, cell in result["columns"].items()}
    rest = {"format_rate": result["format_rate"], "parse_failures": result["failures"], "n": result["n"]}
    return Stage(name, averages | {"tasks": tasks} | rest, round(float(seconds), 1))


def find_results(experiment: Path) -> Results:
    """results.json of an experiment; without this file, the phases that were evaluated on all questions of MIG-Bench.

    So phases that were trained and evaluated alone are stages too. Their seconds are those of the last training. Raises
    ValueError if a file is damaged, and OtherVersion.
    """
    file = experiment / "results.json"
    if file.is_file():
        return read_results(file)
    stages = []
    for phase in find_phases(experiment):
        home = find_mig_bench(phase)
        result = read_result(home / RESULT) if home else {}
        # An evaluation with other settings than the first one of the phase has another folder name.
        if home and home.name == result_folder(result["benchmark"], None, result["generation"]):
            stages.append(make_stage(phase.name, result, read_json(phase / "done.json").get("seconds", 0.0)))
    return Results(experiment.name, 0, "", tuple(stages))


def find_phases(experiment: Path) -> list[Path]:
    """The folders of phases in an experiment's folder, in the order in which they began to train.

    Phases that were only evaluated are first; folders that were moved aside, which have a dot, are left out.
    """
    folders = [path for path in sorted(experiment.glob("*")) if path.is_dir() and "." not in path.name]
    marks = {path: [path / name for name in ("config.yaml", "attempts", "benchmarks")] for path in folders}
    phases = [path for path in folders if any(mark.exists() for mark in marks[path])]
    config = {path: path / "config.yaml" for path in phases}
    return sorted(phases, key=lambda path: config[path].stat().st_mtime if config[path].is_file() else 0.0)


def stages_first(experiment: Path, results: Results) -> list[Path]:
    """The folders of phases in an experiment's folder: first those of its stages, in order, then the others."""
    staged = [experiment / stage.name for stage in results.stages]
    others = [path for path in find_phases(experiment) if path not in staged]
    return [path for path in staged + others if path.is_dir()]


def benchmark_folders(run: Path) -> dict[str, Path]:
    """The folders of results by their names: of a phase, of a model in outputs/eval, or `run` itself, if it is one."""
    if (run / RESULT).is_file():
        return {run.name: run}
    home = run / "benchmarks" if (run / "benchmarks").is_dir() else run
    return {file.parent.name: file.parent for file in sorted(home.glob(f"*/{RESULT}"))}


def find_mig_bench(phase: Path) -> Path | None:
    """The folder with a phase's result of MIG-Bench, by `preference`; None if there is none.

    Raises OtherVersion if an earlier version of the project has evaluated the phase.
    """
    found = [file.parent for file in sorted((phase / "benchmarks").glob(f"mig_bench*/{RESULT}"))]
    if not found and (phase / "mig_bench.json").is_file():
        raise OtherVersion(phase / "mig_bench.json")
    return min(found, key=preference, default=None)


def preference(folder: Path) -> tuple[bool, int, bool, int]:
    """The order of a benchmark's results: all questions first, then more questions, greedy decoding, and the first
    evaluation, which has the shortest name.
    """
    result = read_json(folder / RESULT)
    limit = result.get("limit")
    return limit is not None, -(limit or 0), result.get("generation") != "greedy", len(folder.name)


def read_mig_bench(phase: Path) -> dict[str, Any]:
    """A phase's result of MIG-Bench; {} if there is none. Raises OtherVersion."""
    folder = find_mig_bench(phase)
    return read_result(folder / RESULT) if folder else {}


def started_from(model: str, experiment: str) -> str | None:
    """The stage of an experiment that produced `model`: the phase whose folder contains the merged model, or else the
    first stage. None for a phase of another experiment.
    """
    path = Path(model)
    if path.name != "merged":
        return BASE
    return path.parent.name if path.parent.parent.name == experiment else None


def read_results(path: Path) -> Results:
    """Read results.json. Raises ValueError that names the file if it is damaged or of another version."""
    try:
        record = json.loads(Path(path).read_text())
        if not isinstance(record, dict) or record["version"] != VERSION:
            raise KeyError("version")
        stages = tuple(Stage(**stage) for stage in record["stages"])
        return Results(record["experiment"], record["seed"], record["commit"], stages)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    except (KeyError, TypeError) as error:
        cure = "the command that made it (make pipeline, make ablations) writes it again"
        raise ValueError(f"{path} is damaged, or was written by an earlier version of the project: {cure}") from error


def write_results(path: Path, results: Results) -> None:
    """Write results.json atomically. Raises ValueError for a number that is not finite."""
    record = {"version": VERSION} | asdict(results)
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def current_commit(folder: Path) -> str:
    """The commit of the checkout with `folder`; with suffix `-dirty` if tracked files differ; `unknown` outside git."""
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        run = subprocess.run(git, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else "unknown"
