"""Scoring of MIG-Bench answers: as the official code does it, and with this project's parser and sizes beside it.

The two differ where the official code is wrong for models that write pixels: it divides every number >= 1 by 1000.
Both score the first box, neither asks the model to name the image, and an answer without a box counts as IoU 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from datamodules.benchmarks.mig_bench import IN_DOMAIN, OUT_OF_DOMAIN, TASKS
from datamodules.metrics.official_parsers import extract_box_officially
from datamodules.samples.answer_text import FAILURE_KINDS
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes, iou
from datamodules.samples.sample import Sample
from datamodules.samples.scores import score_text


@dataclass(frozen=True)
class Prediction:
    """One scored answer, as it stands in predictions.jsonl. Boxes are unit xyxy of the target image."""

    id: str
    task: str
    text: str
    truth: Box
    box: Box | None  # the first box, read with the model's box format and the image's sizes
    iou: float
    official_box: Box | None
    official_iou: float
    well_formed: bool  # earns the format reward
    failure: str | None  # why there is no box: one of FAILURE_KINDS, or the rule by which the question was refused
    num_tokens: int
    finished: bool  # False: cut at the token limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Prediction:
        values = {field.name: record[field.name] for field in fields(cls)}
        for name in ("truth", "box", "official_box"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


def score_answer(
    sample: Sample,
    text: str,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    num_tokens: int = 0,
    finished: bool = True,
) -> Prediction:
    """Score one model text against `sample`, whose answer is one box; `image_sizes` has one entry per image."""
    score = score_text(text, sample.answer, image_sizes, box_format)
    truth = sample.answer.box
    official = extract_box_officially(text)
    return Prediction(
        id=sample.id,
        task=sample.task,
        text=text,
        truth=truth,
        box=score.box,
        iou=score.iou,
        official_box=official,
        official_iou=0.0 if official is None else iou(official, truth),
        well_formed=score.well_formed,
        failure=score.failure,
        num_tokens=num_tokens,
        finished=finished,
    )


def score_refused(sample: Sample, rule: str) -> Prediction:
    """A question that could not be put to the model (a truncated image, say): wrong, and counted under `rule`."""
    assert rule not in FAILURE_KINDS
    return Prediction(
        sample.id, sample.task, "", sample.answer.box, None, 0.0, None, 0.0, False, rule, num_tokens=0, finished=True
    )


def average_tasks(tasks: Mapping[str, float]) -> dict[str, float | None]:
    """Macro averages over per-task percentages: "avg", "in_domain", "out_of_domain"; None where no such task is."""

    def mean(names: Sequence[str]) -> float | None:
        values = [tasks[name] for name in names if name in tasks]
        return sum(values) / len(values) if values else None

    return {"avg": mean(TASKS), "in_domain": mean(IN_DOMAIN), "out_of_domain": mean(OUT_OF_DOMAIN)}


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The benchmark's numbers, accuracies and rates in percent (0-100, unrounded).

    {"avg", "in_domain", "out_of_domain", "tasks": {task: Acc@0.5}, "acc_0.3", "acc_0.7", "mean_iou" (macro, 0-1),
     "format_rate", "truncated_rate", "mean_tokens" (all over questions), "parse_failures": {kind: count}, "n",
     "official": the first seven again, by the official rules}

    Here a box counts when IoU > threshold, officially when IoU >= threshold. All averages but the rates are over tasks.
    """
    if not predictions:
        raise ValueError("no predictions to summarise")
    n = len(predictions)
    ours: dict[str, list[float]] = {task: [] for task in TASKS}
    official: dict[str, list[float]] = {task: [] for task in TASKS}
    for prediction in predictions:
        ours[prediction.task].append(prediction.iou)
        official[prediction.task].append(prediction.official_iou)
    return {
        **_accuracies(ours, inclusive=False),
        "format_rate": 100 * sum(prediction.well_formed for prediction in predictions) / n,
        "truncated_rate": 100 * sum(not prediction.finished for prediction in predictions) / n,
        "mean_tokens": sum(prediction.num_tokens for prediction in predictions) / n,
        "parse_failures": dict(sorted(Counter(p.failure for p in predictions if p.failure is not None).items())),
        "n": n,
        "official": _accuracies(official, inclusive=True),
    }


def format_table(summary: Mapping[str, Any]) -> str:
    """A short table for the terminal: one line per task, then the averages."""
    rows = [(task, accuracy, summary["official"]["tasks"][task]) for task, accuracy in summary["tasks"].items()]
    rows += [(key, summary[key], summary["official"][key]) for key in ("in_domain", "out_of_domain", "avg")]
    lines = [f"{'Acc@0.5':<16} {'>0.5':>7} {'official':>9}"]
    lines += [f"{name:<16} {_percent(ours):>7} {_percent(official):>9}" for name, ours, official in rows]
    failures = ", ".join(f"{kind} {count}" for kind, count in summary["parse_failures"].items()) or "none"
    lines.append(f"n {summary['n']}, format {_percent(summary['format_rate'])} %, parse failures: {failures}")
    return "\n".join(lines)


def _accuracies(ious: Mapping[str, Sequence[float]], inclusive: bool) -> dict[str, Any]:
    def accuracy(values: Sequence[float], threshold: float) -> float:
        hits = sum(value >= threshold if inclusive else value > threshold for value in values)
        return 100 * hits / len(values)

    asked = {task: values for task, values in ious.items() if values}
    tasks = {task: accuracy(values, 0.5) for task, values in asked.items()}

    def macro(threshold: float) -> float:
        return sum(accuracy(values, threshold) for values in asked.values()) / len(asked)

    return {
        **average_tasks(tasks),
        "tasks": tasks,
        "acc_0.3": macro(0.3),
        "acc_0.7": macro(0.7),
        "mean_iou": sum(sum(values) / len(values) for values in asked.values()) / len(asked),
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
