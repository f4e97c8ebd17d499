"""From texts to a benchmark's result: each answer scored by a rule, columns, averages, 95 % intervals.

Accuracies and rates are percentages (0-100, unrounded); a mean IoU is 0-1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from datamodules.benchmarks.base import Average, Prediction, Rule, column_of
from datamodules.metrics.extraction import EXTRACTED_READERS
from datamodules.metrics.official_parsers import extract_box_officially, read_choice_as_blink, read_choice_as_mmiu
from datamodules.predictors import Reply
from datamodules.samples.boxes import BoxFormat, iou
from datamodules.samples.choice_text import ChoiceFailure, parse_choice
from datamodules.samples.sample import BoxAnswer, ChoiceAnswer, Sample
from datamodules.samples.scores import score_text

NUM_RESAMPLES = 2000
THRESHOLDS = (0.3, 0.5, 0.7, 0.75, 0.9)  # reported beside the rule's own
COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # mAcc: the mean over these


def predict(sample: Sample, reply: Reply, box_format: BoxFormat, rule: Rule, official: Rule) -> Prediction:
    """The scored record of one reply."""
    unscored = Prediction(
        id=sample.id,
        column=column_of(sample),
        unit=sample.task,
        answer=sample.answer,
        text=reply.text,
        box_format=box_format,
        image_sizes=reply.image_sizes,
        num_tokens=reply.num_tokens,
        finished=reply.finished,
        refused=reply.refused or _size_fault(sample, reply),
    )
    return rescore(unscored, rule, official)


def _size_fault(sample: Sample, reply: Reply) -> str | None:
    if "size" not in sample.extra or not reply.image_sizes:
        return None
    real = reply.image_sizes[sample.answer.image].original
    return None if real == tuple(sample.extra["size"]) else "size_mismatch"


def rescore(prediction: Prediction, rule: Rule, official: Rule) -> Prediction:
    """The same answer scored anew; all it needs is in the record."""
    value, read, failure = _read(prediction, rule)
    official_value, official_read, _ = _read(prediction, official)
    return replace(
        prediction,
        value=value,
        correct=_counts(value, prediction, rule),
        read=read,
        failure=failure,
        official_value=official_value,
        official_correct=_counts(official_value, prediction, official),
        official_read=official_read,
    )


def _counts(value: float, prediction: Prediction, rule: Rule) -> bool:
    if isinstance(prediction.answer, ChoiceAnswer):
        return value == 1.0
    return value >= rule.threshold if rule.inclusive else value > rule.threshold


def _read(prediction: Prediction, rule: Rule) -> tuple[float, str | tuple[float, ...] | None, str | None]:
    """(value, what was read, why nothing was)."""
    if prediction.refused is not None:
        return 0.0, None, prediction.refused
    if isinstance(prediction.answer, ChoiceAnswer):
        found = _read_choice(prediction.text, prediction.answer, rule)
        if found[1] is None and rule.reader in EXTRACTED_READERS and prediction.extracted is not None:
            return float(prediction.extracted == prediction.answer.letter), prediction.extracted, None
        return found
    assert isinstance(prediction.answer, BoxAnswer)
    if rule.reader == "mig_bench":
        box = extract_box_officially(prediction.text)
        return (0.0, None, "no_box") if box is None else (iou(box, prediction.answer.box), box, None)
    how = (prediction.image_sizes, prediction.box_format, rule.box)
    score = score_text(prediction.text, prediction.answer, *how, lenient=True)
    return score.iou, score.box, score.failure


def _read_choice(text: str, answer: ChoiceAnswer, rule: Rule) -> tuple[float, str | None, str | None]:
    if rule.reader == "project":
        found = parse_choice(text, answer.choices)
        if isinstance(found, ChoiceFailure):
            return 0.0, None, found.kind
    else:
        assert rule.reader in ("blink", "mmiu")
        found = read_choice_as_blink(text, answer.choices) if rule.reader == "blink" else read_choice_as_mmiu(text)
        if found is None:
            return 0.0, None, "no_choice"
    return float(found == answer.letter), found, None


def summarise(
    predictions: Sequence[Prediction],
    rule: Rule,
    official: Rule,
    averages: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict[str, Any]:
    """A benchmark's numbers.

    {"n", "columns": {column: cell}, "averages": {name: cell}, "rule", "official": {"rule", "columns", "averages"},
     "details": {"mean_iou", "acc_0.3", …, "macc"} (grounding only), "failures": {kind: count}, "truncated_rate",
     "mean_tokens"}; a cell is {"score", "low", "high", "n"}, its interval that of `interval_cells`.

    Columns that no question is in are left out, and so is an average that lacks one of its columns.
    """
    if not predictions:
        raise ValueError("no predictions to summarise")
    columns, means = interval_cells(_hits(predictions, "correct"), rule, averages, seed)
    official_columns, official_means = interval_cells(_hits(predictions, "official_correct"), official, averages, seed)
    n = len(predictions)
    return {
        "n": n,
        "columns": columns,
        "averages": means,
        "rule": asdict(rule),
        "official": {"rule": asdict(official), "columns": official_columns, "averages": official_means},
        "details": _details(predictions, rule, averages["avg"]),
        "failures": dict(sorted(Counter(p.failure for p in predictions if p.failure is not None).items())),
        "truncated_rate": 100 * sum(not p.finished for p in predictions) / n,
        "mean_tokens": sum(p.num_tokens for p in predictions) / n,
    }


Hits = dict[str, dict[str, list[bool]]]  # column -> unit -> one bool for each question
Weighted = tuple[np.ndarray, int]  # a score, in `interval_cells` with its resamples behind it; the number of questions


def _hits(predictions: Sequence[Prediction], name: str) -> Hits:
    hits: Hits = {}
    for prediction in predictions:
        hits.setdefault(prediction.column, {}).setdefault(prediction.unit, []).append(getattr(prediction, name))
    return hits


def interval_cells(
    hits: Hits, rule: Rule, averages: Mapping[str, Sequence[str]], seed: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Cells of the columns and of the averages, with 95 % percentile intervals of the bootstrap.

    Questions are drawn anew inside each unit, so the draw of a unit's accuracy is Binomial(n, accuracy) / n. Columns
    and averages are computed from the draws as from the answers. The same hits and seed give the same interval.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, Weighted] = {}
    for column in [name for name in averages["avg"] if name in hits]:
        units = []
        for _, values in sorted(hits[column].items()):
            share = sum(values) / len(values)
            drawn = rng.binomial(len(values), share, NUM_RESAMPLES) / len(values)
            units.append((np.concatenate([[share], drawn]), len(values)))
        columns[column] = _mean(units, rule.within)
    means = {
        name: _cell(*_mean([columns[member] for member in members], rule.across))
        for name, members in averages.items()
        if all(member in columns for member in members)
    }
    return {name: _cell(*column) for name, column in columns.items()}, means


def _mean(parts: Sequence[Weighted], how: Average) -> Weighted:
    """The parts' mean (macro), or that of their questions (micro)."""
    sizes = [size for _, size in parts]
    weights = np.array(sizes, float) if how == "micro" else np.ones(len(sizes))
    return np.average([value for value, _ in parts], axis=0, weights=weights), sum(sizes)


def _cell(draws: np.ndarray, n: int) -> dict[str, Any]:
    low, high = np.percentile(100 * draws[1:], [2.5, 97.5])
    return {"score": 100 * float(draws[0]), "low": float(low), "high": float(high), "n": n}


def _details(predictions: Sequence[Prediction], rule: Rule, columns: Sequence[str]) -> dict[str, float]:
    """Of grounding, averaged as the rule says: the mean IoU, other thresholds, and their mean over 0.5 to 0.95."""
    if isinstance(predictions[0].answer, ChoiceAnswer):
        return {}
    grouped: dict[str, dict[str, list[Prediction]]] = {name: {} for name in columns}
    for p in predictions:
        grouped[p.column].setdefault(p.unit, []).append(p)

    def average(value: Callable[[Prediction], float]) -> float:
        means = [
            _mean([(np.mean([value(p) for p in unit]), len(unit)) for unit in units.values()], rule.within)
            for units in grouped.values()
            if units
        ]
        return float(_mean(means, rule.across)[0])

    def accuracy(threshold: float) -> float:
        other = replace(rule, threshold=threshold)
        return 100 * average(lambda p: _counts(p.value, p, other))

    details = {"mean_iou": average(lambda p: p.value)}
    details |= {f"acc_{threshold}": accuracy(threshold) for threshold in THRESHOLDS}
    return details | {"macc": float(np.mean([accuracy(threshold) for threshold in COCO_THRESHOLDS]))}
