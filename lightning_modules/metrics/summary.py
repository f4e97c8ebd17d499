"""Compute a benchmark's numbers from scored answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from datamodules.benchmarks.base import Rule
from datamodules.metrics.detections import Detection
from datamodules.metrics.predictions import Prediction
from datamodules.samples.sample import BoxesAnswer, ChoiceAnswer
from lightning_modules.metrics.average_precision import average_precisions


def summarise(
    predictions: Sequence[Prediction],
    rule: Rule,
    official: Rule,
    averages: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict[str, Any]:
    """A benchmark's numbers, in the format of result.json (datamodules/metrics/result_files.py).

    Args:
        predictions: all scored answers; at least one.
        rule, official: the rules of the paper and of the official code by which they were scored.
        averages: name -> its columns; "avg" has all of them, in the table's order.
        seed: seed of the bootstrap for the intervals.

    Columns without questions are skipped. An average is over the columns that have questions.
    """
    if not predictions:
        raise ValueError("no predictions to summarise")
    n = len(predictions)
    boxes = [p for p in predictions if not isinstance(p.answer, ChoiceAnswer)]  # shards may contain both kinds
    values, officials = [p.value for p in predictions], [p.official_value for p in predictions]
    f1s, official_f1s = (
        [float(p.correct) if p.f1 is None else p.f1 for p in predictions],
        [float(p.official_correct) if p.official_f1 is None else p.official_f1 for p in predictions],
    )
    return {
        "n": n,
        "box_format": predictions[0].box_format,  # one model has one format
        **_numbers(predictions, values, f1s, [p.detections for p in predictions], rule, averages, seed),
        "rule": asdict(rule),
        "official": _numbers(
            predictions, officials, official_f1s, [p.official_detections for p in predictions], official, averages, seed
        )
        | {"rule": asdict(official)},
        "format_rate": 100 * sum(p.well_formed for p in boxes) / len(boxes) if boxes else None,
        "failures": dict(sorted(Counter(p.failure for p in predictions if p.failure is not None).items())),
        "truncated_rate": 100 * sum(not p.finished for p in predictions) / n,
        "mean_tokens": sum(p.num_tokens for p in predictions) / n,
    }


def _numbers(
    predictions: Sequence[Prediction],
    values: Sequence[float],
    f1s: Sequence[float],
    detections: Sequence[Sequence[Detection] | None],
    rule: Rule,
    averages: Mapping[str, Sequence[str]],
    seed: int,
) -> dict[str, Any]:
    """{"columns", "averages", "details"} from one value, one F1, and the detections, for each prediction."""
    if rule.measure == "average_precision":
        return average_precisions(predictions, detections, f1s, rule, averages, seed)
    # Importing torchmetrics takes seconds and loads transformers: so only a process that scores answers imports it.
    from lightning_modules.metrics.accuracy import GroundingAccuracy

    is_choice = [isinstance(p.answer, ChoiceAnswer) for p in predictions]
    if all(is_choice):
        rule = replace(rule, threshold=0.5)  # an option is right (1.0) or wrong (0.0), for any threshold of boxes
    units = [(p.column, p.unit) for p in predictions]
    # All answers are in this process, because the answers of all ranks are read from the journals.
    metric = GroundingAccuracy(list(dict.fromkeys(units)), rule, averages, seed, sync_on_compute=False)
    # F1 stands in the result where some question has several boxes. Of one box, and of an option, it is 0 or 1.
    has_several = any(isinstance(p.answer, BoxesAnswer) for p in predictions)
    metric.update(values, units, f1s if has_several else ())
    return metric.compute() | ({"details": {}} if any(is_choice) else {})
