"""Average precision over a benchmark's questions by COCO's protocol, weighted over groups as in MC-Bench.

For each group of true boxes, all detections of all questions stand in one list. At each of 101 recalls (0, 0.01, … 1)
the precision is the largest one that the list has at this recall or a higher one; 0 where the recall is never reached.
The mean is the group's AP. The result is the mean over groups, weighted by their numbers of true boxes.

COCO sorts the list by confidence and leaves equal ones in their order. No model gives a confidence here, so all are
equal and the order is that of the questions, of the images in a question, and of the boxes in an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.benchmarks.base import Rule
from datamodules.benchmarks.mc_bench import group_of
from datamodules.metrics.detections import Detection, right_images
from datamodules.metrics.predictions import Prediction
from datamodules.samples.scores import true_boxes
from lightning_modules.metrics.bootstrap import NUM_RESAMPLES, percentiles

RECALLS = np.linspace(0.0, 1.0, 101)
CHUNK = 200  # resamples at once, which bounds the memory


@dataclass(frozen=True)
class _Group:
    """One group of true boxes: D detections in the order of the list, and Q questions."""

    questions: np.ndarray  # [D] index of the question
    hits: np.ndarray  # [D] 1.0 or 0.0
    true: np.ndarray  # [Q] number of true boxes


def average_precisions(
    predictions: Sequence[Prediction],
    detections: Sequence[Sequence[Detection] | None],
    f1s: Sequence[float],
    rule: Rule,
    averages: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict[str, Any]:
    """{"columns": {name: cell}, "averages": {name: cell}, "details": {}}, in the format of result.json.

    A cell is {"score", "low", "high", "n", "f1", "image_accuracy"}: AP with its 95 % interval, the number of questions,
    the mean F1, and the share of questions whose boxes are in exactly the images of the true boxes; all but n in
    percent. Questions are resampled inside each column. A column without a true box has AP 0.

    Args:
        predictions: [Q] the scored answers.
        detections: [Q] of each answer by one rule; None for an answer that is wrong in any case.
        f1s: [Q] of each answer by the same rule.
        rule: `across` says whether an average is over its columns, or over their questions, in one list.
        averages: name -> its columns; columns without questions are skipped.
        seed: seed of the bootstrap.
    """
    groups = _groups(predictions, detections)
    members = {
        name: np.array([index for index, found in enumerate(predictions) if found.column == name], int)
        for name in averages["avg"]
    }
    members = {name: indices for name, indices in members.items() if len(indices)}
    # [1 + NUM_RESAMPLES, Q]: how often each question counts; the first row is the benchmark itself.
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + NUM_RESAMPLES, len(predictions)))
    for indices in members.values():
        share = np.full(len(indices), 1 / len(indices))
        weights[1:, indices] = rng.multinomial(len(indices), share, NUM_RESAMPLES)

    right = [
        found is not None and right_images(found, true_boxes(prediction.answer))
        for prediction, found in zip(predictions, detections, strict=True)
    ]
    per_question = {"f1": 100 * np.array(f1s, float), "image_accuracy": 100 * np.array(right, float)}

    def cell(parts: Sequence[np.ndarray]) -> dict[str, Any]:
        """The mean over parts, each the indices of some questions in one list."""
        draws = np.mean([_precision(groups, weights, part) for part in parts], axis=0)
        low, high = percentiles(100 * draws[1:])
        beside = {name: float(np.mean([of[part].mean() for part in parts])) for name, of in per_question.items()}
        n = sum(len(part) for part in parts)
        return {"score": float(100 * draws[0]), "low": low, "high": high, "n": n, **beside}

    columns = {name: cell([indices]) for name, indices in members.items()}
    found = {name: [members[column] for column in names if column in members] for name, names in averages.items()}
    if rule.across == "micro":
        found = {name: [np.sort(np.concatenate(parts))] for name, parts in found.items() if parts}
    return {
        "columns": columns,
        "averages": {name: cell(parts) for name, parts in found.items() if parts},
        "details": {},
    }


def _groups(predictions: Sequence[Prediction], detections: Sequence[Sequence[Detection] | None]) -> dict[int, _Group]:
    """The groups that have a true box. Detections of other groups have no weight."""
    true: dict[int, np.ndarray] = {}
    for index, prediction in enumerate(predictions):
        for answer in true_boxes(prediction.answer):
            true.setdefault(group_of(answer.label), np.zeros(len(predictions)))[index] += 1
    lists: dict[int, list[tuple[int, int]]] = {group: [] for group in true}
    for index, found in enumerate(detections):
        for group, _, hit in sorted(found or (), key=lambda one: one[1]):  # by image; stable, so as written
            if group in lists:
                lists[group].append((index, hit))
    rows = {group: np.array(found, int).reshape(-1, 2) for group, found in lists.items()}
    return {group: _Group(row[:, 0], row[:, 1].astype(float), true[group]) for group, row in sorted(rows.items())}


def _precision(groups: Mapping[int, _Group], weights: np.ndarray, part: np.ndarray) -> np.ndarray:
    """[R] the weighted AP, 0 to 1, of the questions `part` in each row of `weights` [R, Q]."""
    inside = np.zeros(weights.shape[1], bool)
    inside[part] = True
    total, result = np.zeros(len(weights)), np.zeros(len(weights))
    for group in groups.values():
        num_true = weights[:, inside] @ group.true[inside]  # [R]
        listed = inside[group.questions]
        questions, hits = group.questions[listed], group.hits[listed]
        for start in range(0, len(weights), CHUNK):
            rows = slice(start, start + CHUNK)
            result[rows] += num_true[rows] * _curve_mean(weights[rows, questions], hits, num_true[rows])
        total += num_true
    return np.divide(result, total, out=np.zeros_like(result), where=total > 0)


def _curve_mean(weights: np.ndarray, hits: np.ndarray, num_true: np.ndarray) -> np.ndarray:
    """[R] the mean precision at RECALLS of one list in R resamples.

    Args:
        weights: [R, D] how often each detection counts.
        hits: [D] 1.0 or 0.0.
        num_true: [R] number of true boxes; 0 gives 0.
    """
    right, counted = np.cumsum(weights * hits, axis=1), np.cumsum(weights, axis=1)
    precision = np.divide(right, counted, out=np.zeros_like(right), where=counted > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = np.zeros(len(weights))
    for row in np.flatnonzero(num_true):
        places = np.searchsorted(right[row] / num_true[row], RECALLS, side="left")
        reached = places[places < len(hits)]
        means[row] = best[row, reached].sum() / len(RECALLS)
    return means
