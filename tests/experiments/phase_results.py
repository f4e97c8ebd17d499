"""A phase's result of MIG-Bench, made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.metrics.predictions import Prediction
from datamodules.metrics.result_files import write_evaluation


def cell(score: float, n: int = 100) -> dict[str, Any]:
    """A column or an average."""
    return {"score": score, "low": score - 1, "high": score + 1, "n": n}


def summary(avg: float = 50.0, **changes: Any) -> dict[str, Any]:
    """What result.json holds, of two tasks."""
    averages = {"avg": avg, "in_domain": 60.0, "out_of_domain": 43.3}
    columns = {"diff": cell(60.0), "reasoning": cell(43.3)}
    result = {"benchmark": "mig_bench", "model": "m", "data_root": "d", "key": "k", "limit": None}
    result |= {"generation": "greedy", "n": 200, "columns": columns, "details": {"mean_iou": 0.4}}
    result |= {"averages": {name: cell(score) for name, score in averages.items()}, "official": {}}
    return result | {"format_rate": 99.0, "failures": {"no_box": 2}} | changes


def write_mig_bench(phase: Path, result: Mapping[str, Any], predictions: Sequence[Prediction] = ()) -> Path:
    """Write a phase's result of MIG-Bench; its folder."""
    folder = phase / "benchmarks/mig_bench"
    write_evaluation(folder, predictions, result)
    return folder
