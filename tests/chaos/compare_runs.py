"""What differs between two finished experiments that should be the same but for their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datamodules.persistence.files import file_sha256, read_json, read_sound_lines
from experiments.runs import metrics_csv


def differences(first: Path, second: Path, stages: Sequence[str]) -> list[str]:
    """One line for each thing of `first` that is not the same in `second`; [] where all is equal.

    Compared are results.json, and for each stage the merged model bit for bit, what rejection sampling kept, the
    answers, every logged value, and that W&B has one run.
    """
    checks: list[tuple[str, Callable[[Path], Any]]] = [("results.json", _results), ("base: answers", _answers("base"))]
    for stage in stages:
        checks += [
            (f"{stage}: merged model", lambda f, s=stage: _hashes(f / s / "merged")),
            (f"{stage}: rejection sampling", lambda f, s=stage: _hashes(f / s / "rejection_sampling/shards")),
            (f"{stage}: kept list", lambda f, s=stage: read_sound_lines(f / s / "rejection_sampling/kept.jsonl")),
            (f"{stage}: answers", _answers(stage)),
            (f"{stage}: metrics", lambda f, s=stage: _metrics(f / s)),
        ]
    found = []
    for name, read in checks:
        a, b = read(first), read(second)
        if a != b:
            found.append(f"{name}: {_first_difference(a, b)}")
    for stage in stages:
        if not (first / stage / "merged").is_dir():
            found.append(f"{stage}: {first} has no merged model")
        ids = {path.name.split("-")[-1] for path in (second / stage / "wandb").glob("offline-run-*")}
        if len(ids) > 1:
            found.append(f"{stage}: W&B has the runs {sorted(ids)}")
    return found


def _results(folder: Path) -> Any:
    results = read_json(folder / "results.json")
    return results | {"stages": [stage | {"seconds": None} for stage in results.get("stages", ())]}


def _answers(stage: str) -> Callable[[Path], Any]:
    file = Path(stage, "benchmarks/mig_bench/predictions.jsonl")
    return lambda folder: {record["id"]: record for record in read_sound_lines(folder / file)}


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted(folder.glob("*")) if file.is_file()}


def _metrics(folder: Path) -> dict[str, dict[str, str]]:
    """Every logged value by step, without times."""
    rows = metrics_csv.read_rows(folder)
    return {row["step"]: {name: row[name] for name in row if not name.startswith("speed/")} for row in rows}


def _first_difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if a.get(name) != b.get(name):
                return f"{name}: {_first_difference(a.get(name), b.get(name))}"
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        index = next(index for index, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
        return f"[{index}]: {_first_difference(a[index], b[index])}"
    return f"{str(a)[:120]} is {str(b)[:120]}"
