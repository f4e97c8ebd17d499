"""95 % intervals of accuracies, by a bootstrap over questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from datamodules.benchmarks.base import Average, Rule

NUM_RESAMPLES = 2000
Counts = Mapping[str, Mapping[str, tuple[int, int]]]  # column -> unit -> (right answers, questions)
Draws = tuple[np.ndarray, int]  # accuracies in the resamples [NUM_RESAMPLES]; the number of questions


def bootstrap_intervals(
    counts: Counts, rule: Rule, averages: Mapping[str, Sequence[str]], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """(low, high) of each column and average, in percent: the 2.5 and 97.5 percentiles of the resamples.

    Questions are resampled inside each unit, so the resampled accuracy of a unit is Binomial(n, accuracy) / n. Columns
    and averages are computed from the resampled values in the same way as from the answers. The same counts and seed
    give the same intervals.

    Args:
        counts: numbers of right answers and questions, for each unit of each column.
        rule: how units and columns are averaged.
        averages: name -> its columns; columns without questions are skipped. "avg" has all columns, in the table's
            order.
        seed: seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, Draws] = {}
    for column in [name for name in averages["avg"] if name in counts]:
        units = [
            (rng.binomial(total, right / total, NUM_RESAMPLES) / total, total)
            for _, (right, total) in sorted(counts[column].items())
        ]
        columns[column] = _mean(units, rule.within)
    members = {name: [columns[member] for member in found if member in columns] for name, found in averages.items()}
    means = {name: _mean(found, rule.across) for name, found in members.items() if found}
    return {name: percentiles(100 * draws) for name, (draws, _) in (columns | means).items()}


def _mean(parts: Sequence[Draws], how: Average) -> Draws:
    """The mean over parts (macro), or over their questions (micro)."""
    sizes = [size for _, size in parts]
    weights = np.array(sizes, float) if how == "micro" else np.ones(len(sizes))
    return np.average([draws for draws, _ in parts], axis=0, weights=weights), sum(sizes)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The limits of the 95 % interval of `draws`."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
