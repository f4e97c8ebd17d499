"""How sure a difference between two rows of an ablation is: a paired bootstrap over questions and seeds.

Both rows answer the same questions, so a resample draws each question for both at once, inside its task; and, since a
seed's luck is not a question's, it draws the seeds anew too. Of one seed, only questions are drawn: the interval then
says nothing of how much another seed would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datamodules.benchmarks.mig_bench import AVERAGES
from lightning_modules.metrics.bootstrap import NUM_RESAMPLES

Hits = Mapping[str, np.ndarray]  # task -> bool [seeds, questions]: which answers are right
# How much more is gained out-of-domain than in-domain.
TRANSFER = "out_of_domain - in_domain"


@dataclass(frozen=True)
class Difference:
    """A difference in percentage points with its 95 % percentile interval, and the two-sided p-value of "none"."""

    value: float
    low: float
    high: float
    p: float


def paired_differences(row: Hits, over: Hits, seed: int = 0) -> dict[str, Difference]:
    """`row` minus `over`: of "avg", "in_domain" and "out_of_domain" (means over tasks), and of `TRANSFER`.

    The same hits and seed give the same numbers. Averages without a task are left out. Raises ValueError where the two
    do not have the same tasks, seeds and questions.
    """
    shapes, other = ({task: hits.shape for task, hits in rows.items()} for rows in (row, over))
    if shapes != other or not shapes:
        raise ValueError(f"rows to be paired need the same tasks, seeds and questions: {shapes} and {other}")
    # 1. Seeds drawn with replacement: the share of each seed in each resample.
    rng = np.random.default_rng(seed)
    num_seeds = next(iter(shapes.values()))[0]
    chosen = rng.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    shares = np.stack([(chosen == k).mean(axis=1) for k in range(num_seeds)], axis=1)  # [resamples, seeds]
    # 2. Questions drawn with replacement within each task. Both rows are resampled alike, so their pairs stay together.
    drawn = {}
    for task in sorted(shapes):
        difference = row[task].astype(float) - over[task].astype(float)  # [seeds, questions]
        questions = rng.integers(difference.shape[1], size=(NUM_RESAMPLES, difference.shape[1]))
        resampled = np.take_along_axis(shares @ difference, questions, axis=1).mean(axis=1)
        drawn[task] = 100 * np.concatenate([[difference.mean()], resampled])  # the first: as measured
    # 3. Averages of the same resamples, so that the tasks' variation carries over.
    members = {name: [drawn[task] for task in tasks if task in drawn] for name, tasks in AVERAGES.items()}
    averages = {name: sum(found) / len(found) for name, found in members.items() if found}
    if {"in_domain", "out_of_domain"} <= set(averages):
        averages[TRANSFER] = averages["out_of_domain"] - averages["in_domain"]
    return {name: _difference(values) for name, values in averages.items()}


def _difference(values: np.ndarray) -> Difference:
    measured, drawn = float(values[0]), values[1:]
    low, high = np.percentile(drawn, [2.5, 97.5])
    # As many resamples on the other side of 0 as the smaller side holds, and the measured one itself.
    tail = 1 + min(np.sum(drawn <= 1e-9), np.sum(drawn >= -1e-9))
    return Difference(measured, float(low), float(high), min(1.0, 2 * float(tail) / (len(drawn) + 1)))
