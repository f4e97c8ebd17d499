"""The files of one benchmark's evaluation: predictions.jsonl, and result.json, the one result schema.

    {"benchmark": "ref_l4", "model": "models/nano-base", "data_root": "data/nano", "key": "…",
     "limit": null, "generation": "greedy", "extractor": null, "dropped": {}, "n": 80,
     "columns": {"val": {"score", "low", "high", "n"}, …}, "averages": {"avg": {…}}, "rule": {…},
     "official": {"rule", "columns", "averages"}, "details": {…}, "failures": {…}, "truncated_rate", "mean_tokens"}

`generation` says by which rules answers were decoded; files of earlier versions, whose rules differed from model to
model, lack it. `extractor` is {"model", "asked", "found", "none", "failed"} where a language model took the last step
of the official reading (`extraction.py`).

Scores and rates are percentages; low and high bound the 95 % interval (`scoring.interval_cells`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import Prediction, require_fields
from datamodules.persistence.files import read_json, write_atomic, write_json

PREDICTIONS, RESULT = "predictions.jsonl", "result.json"
_FIELDS = ("benchmark", "model", "data_root", "limit", "n", "columns", "averages", "rule", "official", "failures")


def write_evaluation(folder: Path, predictions: Sequence[Prediction], result: Mapping[str, Any]) -> None:
    """The result last: a folder that has one is whole."""
    (folder / RESULT).unlink(missing_ok=True)
    lines = (json.dumps(prediction.to_json(), ensure_ascii=False) + "\n" for prediction in predictions)
    write_atomic(folder / PREDICTIONS, "".join(lines))
    write_json(folder / RESULT, dict(result))


def read_predictions(path: Path) -> list[Prediction]:
    """Raises ValueError that names the line of a broken record, FileNotFoundError without the file."""
    predictions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            predictions.append(Prediction.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return predictions


def read_result(path: Path) -> dict[str, Any]:
    """Raises ValueError that names a missing field."""
    result = read_json(path)
    require_fields(result, _FIELDS, str(path))
    return result


def format_result(result: Mapping[str, Any]) -> str:
    """A table for the terminal: one line a column, then the averages, beside the official rule."""
    lines = [f"{result['benchmark']:<24} {'score':>7} {'95 % interval':>17} {'official':>9} {'n':>6}"]
    for kind in ("columns", "averages"):
        for name, cell in result[kind].items():
            official = result["official"][kind].get(name)
            interval = f"[{cell['low']:.2f}, {cell['high']:.2f}]"
            right = "-" if official is None else f"{official['score']:.2f}"
            lines.append(f"{name:<24} {cell['score']:>7.2f} {interval:>17} {right:>9} {cell['n']:>6}")
    failures = ", ".join(f"{kind} {count}" for kind, count in result["failures"].items()) or "none"
    lines.append(f"{result['rule']['source']}; answers that could not be read: {failures}")
    if extractor := result.get("extractor"):
        failed = ", ".join(f"{kind} {count}" for kind, count in extractor["failed"].items()) or "none"
        counts = f"{extractor['asked']} answers, a letter in {extractor['found']}, none in {extractor['none']}"
        lines.append(f"official: {extractor['model']} read {counts}; failed: {failed}")
    if result.get("generation") == "model":
        lines.append("decoded by the model's own generation settings")
    return "\n".join(lines)
