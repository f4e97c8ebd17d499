"""The files of one evaluation: predictions.jsonl with every scored answer, and result.json.

    {"version": 2, "benchmark": "mig_bench", "model": "models/nano-base", "data_root": "data/nano", "key": "…",
     "questions": "…", "limit": null, "generation": "greedy", "extractor": null, "dropped": {}, "n": 3000,
     "box_format": "absolute_pixels", "columns": {"diff": {"score", "low", "high", "n"}, …},
     "averages": {"avg": {…}, "in_domain": {…}, …},
     "details": {"mean_iou", "acc_0.3", "acc_0.5", …, "macc"}, "rule": {…},
     "official": {"columns", "averages", "details", "rule"},
     "format_rate": 99.9, "failures": {"no_box": 3}, "truncated_rate": 0.1, "mean_tokens": 71.5}

Scores and rates are percentages (0-100, unrounded), a mean IoU is 0-1; `low` and `high` are the limits of the 95 %
interval. For multiple choice, `details` is empty and `format_rate` is null. If questions have several boxes, each cell
also has "f1" at the rule's threshold, and the IoU of such an answer is that of its worst pair. If the rule's `measure`
is "average_precision", the scores are AP, each cell also has "image_accuracy", and `details` is empty. `generation`
describes the decoding of answers. `extractor` is {"model", "asked", "found", "none", "failed"} if a language model did
the last step of the official parser (`extraction.py`). `key` is a hash of questions and model, `questions` one of the
questions with their images. An evaluation inside training adds "step".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.metrics.predictions import Prediction
from datamodules.persistence.files import read_json, storage_error, write_atomic, write_json
from datamodules.persistence.user_error import UserError

PREDICTIONS, RESULT = "predictions.jsonl", "result.json"
VERSION = 2  # version of both files; files of version 1 have no such field
# The fields of `details` that W&B and the tables in training show.
LOGGED_DETAILS = ("acc_0.3", "acc_0.7", "mean_iou")
# The numbers of a cell that some benchmarks have beside the score -> heading in the terminal.
BESIDE = {"f1": "F1", "image_accuracy": "images"}


class OtherVersion(UserError, ValueError):
    """The files of an evaluation have another version. The message says how to fix it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} was written by an earlier version of the project, in another form. Evaluate the model again "
            "(make eval, or make pipeline), or move this file away"
        )


def result_folder(name: str, limit: int | None, generation: str) -> str:
    """The folder of a benchmark's results. Each prompt style has its own folder, so nothing is overwritten."""
    how = "" if generation == "greedy" else "-model-generation"
    return name + how + ("" if limit is None else f"-limit{limit}")


def write_evaluation(folder: Path, predictions: Sequence[Prediction], result: Mapping[str, Any]) -> None:
    """Write both files. result.json is written last, so a folder with this file is complete. Raises StorageError."""
    try:
        # If the process stopped in between, an old result would appear to belong to the new predictions.
        (folder / RESULT).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder / RESULT) from error
    lines = (json.dumps(prediction.to_json(), ensure_ascii=False) + "\n" for prediction in predictions)
    write_atomic(folder / PREDICTIONS, "".join(lines))
    write_json(folder / RESULT, {"version": VERSION, **result})


def read_predictions(path: Path) -> list[Prediction]:
    """Read the predictions.

    Raises ValueError that names the line of a broken record, FileNotFoundError without the file.
    """
    predictions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            predictions.append(Prediction.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return predictions


def read_result(path: Path) -> dict[str, Any]:
    """Read the result. Raises OtherVersion for a file of another version, FileNotFoundError without the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    result = read_json(path)
    if not isinstance(result, dict) or result.get("version") != VERSION:
        raise OtherVersion(path)
    return result


def same_questions(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two results are of the same questions; ids are positions, so different files have the same ids.

    A result of an earlier version has no hash of its questions; then the folders of the data are compared.
    """
    field = "data_root" if None in (first.get("questions"), second.get("questions")) else "questions"
    return first.get(field) == second.get(field)


def result_metrics(result: Mapping[str, Any], suffix: str = "") -> dict[str, float]:
    """The values of a result that are logged, as "<benchmark><suffix>/avg" and so on: all columns and averages,
    accuracy at other thresholds, rates, mean length, and the official average if it has a meaning.
    """
    cells = result["columns"] | result["averages"]
    values = {name: cell["score"] for name, cell in cells.items()}
    for beside in BESIDE:
        values |= {f"{beside}/{name}": cell[beside] for name, cell in cells.items() if beside in cell}
    values |= {name: result["details"].get(name) for name in LOGGED_DETAILS}
    values |= {name: result[name] for name in ("format_rate", "truncated_rate", "mean_tokens")}
    if official_gap(result) is None:
        values["official_avg"] = result["official"]["averages"]["avg"]["score"]
    return {f"{result['benchmark']}{suffix}/{name}": value for name, value in values.items() if value is not None}


def official_gap(result: Mapping[str, Any]) -> str | None:
    """Why the official scores of a result say nothing about the model, as a sentence; None if they do.

    The official parser of MIG-Bench divides every number above 1 by 1000, so boxes in pixels are always wrong.
    """
    pixels = result.get("box_format") == "absolute_pixels"
    if not pixels or result["official"].get("rule", {}).get("reader") != "mig_bench":
        return None
    return (
        "The official scores are left out: MIG-Bench's own parser takes numbers for thousandths of the image, and this "
        "model writes pixels"
    )


def format_result(result: Mapping[str, Any]) -> str:
    """A table for the terminal: one line per column, then the averages. The official score is beside each."""
    beside = [name for name in BESIDE if any(name in cell for cell in result["columns"].values())]
    gap = official_gap(result)
    head = f"{result['benchmark']:<24} {'score':>7} {'95 % interval':>17}"
    head += f" {'official':>9} {'n':>6}" if gap is None else f" {'n':>6}"
    lines = [head + "".join(f" {BESIDE[name]:>7}" for name in beside)]
    for kind in ("columns", "averages"):
        for name, cell in result[kind].items():
            official = result["official"][kind][name]["score"]
            interval = f"[{cell['low']:.2f}, {cell['high']:.2f}]"
            line = f"{name:<24} {cell['score']:>7.2f} {interval:>17}"
            line += f" {official:>9.2f} {cell['n']:>6}" if gap is None else f" {cell['n']:>6}"
            lines.append(line + "".join(f" {cell[name]:>7.2f}" for name in beside if name in cell))
    failures = ", ".join(f"{kind} {count}" for kind, count in result["failures"].items()) or "none"
    form = "" if result["format_rate"] is None else f"format {result['format_rate']:.2f} %, "
    lines.append(f"{result['rule']['source']}; {form}answers that could not be read: {failures}")
    lines += [gap] if gap else []
    if extractor := result.get("extractor"):
        failed = ", ".join(f"{kind} {count}" for kind, count in extractor["failed"].items()) or "none"
        counts = f"{extractor['asked']} answers, a letter in {extractor['found']}, none in {extractor['none']}"
        lines.append(f"official: {extractor['model']} read {counts}; failed: {failed}")
    if result.get("generation") == "model":
        lines.append("decoded by the model's own generation settings")
    return "\n".join(lines)
