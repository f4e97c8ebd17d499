"""The uncertainty of a difference between two rows of an ablation: a paired bootstrap over questions and seeds.

Both rows answer the same questions, so each resample draws questions within a task for both rows together. Questions
about the same images are not independent, so they are drawn together, as one cluster. Seeds are another source of
variation, so each resample also draws seeds. With one seed, only questions are drawn, and the interval does not include
the variation between seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.benchmarks.mig_bench import AVERAGES
from lightning_modules.metrics.bootstrap import NUM_RESAMPLES, percentiles

Hits = Mapping[str, np.ndarray]  # task -> bool [seeds, questions]: which answers are right
Clusters = Mapping[str, np.ndarray]  # task -> int [questions]: the number of each question's set of images, from 0
# Name of the gain out-of-domain minus the gain in-domain.
TRANSFER = "out_of_domain - in_domain"


@dataclass(frozen=True)
class Difference:
    """A difference in percentage points with its 95 % percentile interval, and the two-sided p-value of the hypothesis
    "no difference".
    """

    value: float
    low: float
    high: float
    p: float


def paired_differences(row: Hits, over: Hits, clusters: Clusters | None = None, seed: int = 0) -> dict[str, Difference]:
    """`row` minus `over` for "avg", "in_domain" and "out_of_domain" (means over tasks), and for `TRANSFER`.

    The same hits and seed give the same numbers. Averages without a task are skipped.

    Args:
        row: right answers of one row.
        over: right answers of the other row.
        clusters: which questions are about the same images; None: no two are.
        seed: of the random numbers.

    Raises:
        ValueError: the two rows do not have the same tasks, seeds and questions.
    """
    shapes, other = ({task: hits.shape for task, hits in rows.items()} for rows in (row, over))
    if shapes != other or not shapes:
        raise ValueError(f"rows to be paired need the same tasks, seeds and questions: {shapes} and {other}")
    # 1. Draw seeds with replacement: the share of each seed in each resample.
    rng = np.random.default_rng(seed)
    num_seeds = next(iter(shapes.values()))[0]
    seeds = rng.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    shares = np.stack([(seeds == k).mean(axis=1) for k in range(num_seeds)], axis=1)  # [resamples, seeds]
    # 2. Draw clusters of questions with replacement within each task. Both rows use the same questions, so pairs stay
    # together.
    drawn = {}
    for task in sorted(shapes):
        difference = row[task].astype(float) - over[task].astype(float)  # [seeds, questions]
        belongs = np.eye(difference.shape[1])  # [questions, clusters]: 1 where a question belongs to a cluster
        if clusters is not None:
            belongs = np.eye(clusters[task].max() + 1)[clusters[task]]
        chosen = rng.integers(belongs.shape[1], size=(NUM_RESAMPLES, belongs.shape[1]))
        # The mean over the questions of the drawn clusters, which may differ in size.
        totals = np.take_along_axis(shares @ difference @ belongs, chosen, axis=1).sum(axis=1)
        resampled = totals / belongs.sum(axis=0)[chosen].sum(axis=1)
        drawn[task] = 100 * np.concatenate([[difference.mean()], resampled])  # the first value is the measured one
    # 3. Averages over tasks, from the same resamples, so that they include the variation of all tasks.
    members = {name: [drawn[task] for task in tasks if task in drawn] for name, tasks in AVERAGES.items()}
    averages = {name: sum(found) / len(found) for name, found in members.items() if found}
    if {"in_domain", "out_of_domain"} <= set(averages):
        averages[TRANSFER] = averages["out_of_domain"] - averages["in_domain"]
    return {name: _difference(values) for name, values in averages.items()}


def _difference(values: np.ndarray) -> Difference:
    measured, drawn = float(values[0]), values[1:]
    low, high = percentiles(drawn)
    # Two-sided p-value: twice the number of resamples on the smaller side of 0, where the measured value counts as one.
    tail = 1 + min(np.sum(drawn <= 1e-9), np.sum(drawn >= -1e-9))
    return Difference(measured, low, high, min(1.0, 2 * float(tail) / (len(drawn) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for the number of comparisons (Holm, 1979, Scandinavian Journal of Statistics 6).

    A comparison whose corrected value is at most 0.05 is significant, and the chance of any false one among all of them
    is at most 5 %.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))  # never below a smaller p-value's
        corrected[index] = largest
    return corrected
