"""Acc@t and mean IoU over a benchmark's questions. Training, evaluation and rescoring all use this definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from datamodules.benchmarks.base import Average, Rule
from lightning_modules.metrics.bootstrap import bootstrap_intervals

THRESHOLDS = (0.3, 0.5, 0.7, 0.75, 0.9)  # reported in addition to the threshold of the rule
COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # mAcc is the mean over these thresholds
Unit = tuple[str, str]  # (column, unit): ("diff", "diff") in MIG-Bench, whose columns are tasks


class GroundingAccuracy(Metric):
    """Acc@t of one predicted box against one true box, and mean IoU, per column and averaged over columns.

    Acc@t is the percentage of questions whose IoU exceeds t (or reaches it, if the rule is inclusive). A question
    without a readable box has IoU 0. Units and columns without questions are skipped.

    The IoU of an answer of several boxes is that of its worst pair. F1 is averaged beside it.

    Every state is a sum, so ranks may have different numbers of questions. Shapes: U units, T thresholds.

        hits [U, T] int64        questions whose IoU counts at the threshold
        iou_sum [U] float64      sum of their IoUs
        f1_sum [U] float64       sum of their F1, where that is given
        f1_count int64           number of questions with an F1, of all units
        count [U] int64          number of questions
    """

    full_state_update = False
    higher_is_better = True

    def __init__(
        self,
        units: Sequence[Unit],
        rule: Rule,
        averages: Mapping[str, Sequence[str]],
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Args:
        units: all units that questions may have; equal on all ranks.
        rule: threshold of the columns' scores, and how units and columns are averaged.
        averages: name -> its columns; "avg" has all of them, in the table's order.
        seed: seed of the bootstrap for the intervals.
        kwargs: arguments of `Metric`, such as sync_on_compute=False if one process has all questions.
        """
        super().__init__(**kwargs)
        self.units, self.rule, self.averages, self.seed = tuple(units), rule, averages, seed
        self.thresholds = tuple(sorted({rule.threshold, *THRESHOLDS, *COCO_THRESHOLDS}))
        shape = (len(self.units), len(self.thresholds))
        self.add_state("hits", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("iou_sum", torch.zeros(shape[0], dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("f1_sum", torch.zeros(shape[0], dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("f1_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape[0], dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ious: Sequence[float], units: Sequence[Unit], f1s: Sequence[float] = ()) -> None:
        """Add N questions.

        Args:
            ious: [N], 0 where no box could be read.
            units: [N], the unit of each question.
            f1s: [N], where some questions have several boxes; () where none has.
        """
        for value, unit in zip(f1s, units, strict=bool(f1s)):
            self.f1_sum[self.units.index(unit)] += value
            self.f1_count += 1
        by_unit: dict[Unit, list[float]] = {}
        for iou, unit in zip(ious, units, strict=True):
            by_unit.setdefault(unit, []).append(iou)
        for unit, values in by_unit.items():
            index = self.units.index(unit)
            tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
            # [T, N] -> [T]: hits at each threshold.
            self.hits[index] += torch.stack([self.rule.counts(tensor, t) for t in self.thresholds]).sum(1)
            self.iou_sum[index] += sum(values)
            self.count[index] += len(values)

    def compute(self) -> dict[str, Any]:
        """{"columns": {name: cell}, "averages": {name: cell}, "details": {"mean_iou", "acc_0.3", …, "macc"}}.

        A cell is {"score", "low", "high", "n"}: accuracy at the threshold of the rule, its 95 % interval, and the
        number of questions; and "f1" (0-100), where F1 is given. The details are averaged in the same way as "avg";
        "macc" is the mean accuracy over `COCO_THRESHOLDS`.
        """
        hits, iou_sums, counts = self.hits.tolist(), self.iou_sum.tolist(), self.count.tolist()
        asked = [index for index, count in enumerate(counts) if count]
        at = self.thresholds.index

        # 1. Scores of columns and averages at the rule's own threshold.
        right = [row[at(self.rule.threshold)] for row in hits]
        scores = self._average([100 * value for value in right], counts)
        # 2. Intervals from the same counts.
        unit_counts: dict[str, dict[str, tuple[int, int]]] = {}
        for index in asked:
            column, unit = self.units[index]
            unit_counts.setdefault(column, {})[unit] = (right[index], counts[index])
        intervals = bootstrap_intervals(unit_counts, self.rule, self.averages, self.seed)
        cells = {name: _cell(score, n, intervals[name]) for name, (score, n) in scores.items()}
        if self.f1_count:
            for name, (f1, _) in self._average([100 * total for total in self.f1_sum.tolist()], counts).items():
                cells[name]["f1"] = f1
        # 3. Other thresholds and the IoU itself, averaged like "avg".
        details = {"mean_iou": self._average(iou_sums, counts)["avg"][0]}
        accuracies = {t: self._average([100 * row[at(t)] for row in hits], counts)["avg"][0] for t in self.thresholds}
        details |= {f"acc_{t}": accuracies[t] for t in THRESHOLDS}
        details["macc"] = sum(accuracies[t] for t in COCO_THRESHOLDS) / len(COCO_THRESHOLDS)
        return {
            "columns": {name: cell for name, cell in cells.items() if name in unit_counts},
            "averages": {name: cell for name, cell in cells.items() if name not in unit_counts},
            "details": details,
        }

    def _average(self, totals: Sequence[float], counts: Sequence[int]) -> dict[str, tuple[float, int]]:
        """(mean, number of questions) of each column and average that has questions.

        Args:
            totals: [U], a sum over the questions of each unit.
            counts: [U], the number of these questions.
        """
        members: dict[str, list[tuple[float, int]]] = {name: [] for name in self.averages["avg"]}
        for (column, _), total, count in zip(self.units, totals, counts, strict=True):
            if count:
                members[column].append((total, count))
        columns = {name: _within(units, self.rule.within) for name, units in members.items() if units}
        found = {name: [columns[c] for c in names if c in columns] for name, names in self.averages.items()}
        return columns | {name: _across(means, self.rule.across) for name, means in found.items() if means}


def _within(units: Sequence[tuple[float, int]], how: Average) -> tuple[float, int]:
    """The mean of a column from (total, count) of its units: mean over its questions (micro), or over the means of its
    units (macro).
    """
    count = sum(n for _, n in units)
    if how == "micro":
        return sum(total for total, _ in units) / count, count
    return sum(total / n for total, n in units) / len(units), count


def _across(columns: Sequence[tuple[float, int]], how: Average) -> tuple[float, int]:
    """The mean of columns, each given as (mean, count): over their questions (micro), or over the columns with equal
    weights (macro).
    """
    count = sum(n for _, n in columns)
    if how == "micro":
        return sum(mean * n for mean, n in columns) / count, count
    return sum(mean for mean, _ in columns) / len(columns), count


def _cell(score: float, n: int, interval: tuple[float, float]) -> dict[str, Any]:
    return {"score": score, "low": interval[0], "high": interval[1], "n": n}
