"""Acc@t as one metric: averages, thresholds, ranks with different numbers of questions."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed

from datamodules.benchmarks.base import Rule
from datamodules.benchmarks.mig_bench import AVERAGES, RULE, TASKS
from lightning_modules.metrics.accuracy import COCO_THRESHOLDS, THRESHOLDS, GroundingAccuracy
from lightning_modules.metrics.bootstrap import bootstrap_intervals
from tests.lightning_modules.ranks import run_ranks

TASK_UNITS = [(task, task) for task in TASKS]


def questions(count: int) -> tuple[list[float], list[tuple[str, str]]]:
    """IoUs, some of them exactly a threshold, and tasks; without one of the tasks."""
    rng = random.Random(0)
    ious = [rng.choice([0.0, 0.3, 0.5, 0.7, 1.0, rng.random()]) for _ in range(count)]
    return ious, [rng.choice(TASK_UNITS[1:]) for _ in range(count)]


def reference(ious: list[float], units: list[tuple[str, str]], threshold: float, inclusive: bool) -> dict[str, float]:
    """Percentages by column and average, counted question by question."""
    by_task: dict[str, list[bool]] = {}
    for iou, (task, _) in zip(ious, units, strict=True):
        by_task.setdefault(task, []).append(iou >= threshold if inclusive else iou > threshold)
    tasks = {task: 100 * float(np.mean(hits)) for task, hits in by_task.items()}
    averages = {name: [tasks[task] for task in members if task in tasks] for name, members in AVERAGES.items()}
    return tasks | {name: float(np.mean(values)) for name, values in averages.items()}


@pytest.mark.parametrize("inclusive", [False, True])
def test_accuracies_are_those_that_are_counted_one_by_one(inclusive: bool) -> None:
    ious, units = questions(101)
    metric = GroundingAccuracy(TASK_UNITS, replace(RULE, inclusive=inclusive), AVERAGES)
    for start in (0, 40, 80):  # in parts
        metric.update(ious[start : start + 40], units[start : start + 40])
    found = metric.compute()
    cells = found["columns"] | found["averages"]
    assert {name: cell["score"] for name, cell in cells.items()} == pytest.approx(
        reference(ious, units, 0.5, inclusive), abs=1e-12
    )
    assert "diff" not in found["columns"], "nobody asked it"
    assert sum(cell["n"] for cell in found["columns"].values()) == found["averages"]["avg"]["n"] == 101
    for threshold in THRESHOLDS:
        expected = reference(ious, units, threshold, inclusive)["avg"]
        assert found["details"][f"acc_{threshold}"] == pytest.approx(expected, abs=1e-12)
    every = [reference(ious, units, threshold, inclusive)["avg"] for threshold in COCO_THRESHOLDS]
    assert found["details"]["macc"] == pytest.approx(np.mean(every), abs=1e-12)
    means = [np.mean([iou for iou, unit in zip(ious, units, strict=True) if unit == u]) for u in TASK_UNITS[1:]]
    assert found["details"]["mean_iou"] == pytest.approx(np.mean(means), abs=1e-12)


def test_two_ranks_with_different_numbers_of_questions_give_what_one_process_gives() -> None:
    ious, units = questions(101)

    def work() -> dict:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        metric = GroundingAccuracy(TASK_UNITS, RULE, AVERAGES)
        mine = slice(0, 67) if rank == 0 else slice(67, None)  # 67 and 34 questions
        metric.update(ious[mine], units[mine])
        own = int(metric.count.sum())
        found = metric.compute()
        torch.distributed.destroy_process_group()
        return found | {"own": own}

    first, second = run_ranks(2, work)
    assert (first.pop("own"), second.pop("own")) == (67, 34) and first == second
    one = GroundingAccuracy(TASK_UNITS, RULE, AVERAGES)
    one.update(ious, units)
    expected = one.compute()
    assert first["columns"] == expected["columns"] and first["averages"] == expected["averages"]
    mean_iou, other = first["details"].pop("mean_iou"), expected["details"].pop("mean_iou")
    assert first["details"] == expected["details"] and mean_iou == pytest.approx(other, abs=1e-12)


def test_a_rank_without_a_question_takes_part() -> None:
    def work() -> float:
        torch.distributed.init_process_group("gloo")
        metric = GroundingAccuracy(TASK_UNITS, RULE, AVERAGES)
        if torch.distributed.get_rank() == 0:
            metric.update([0.9, 0.1], [("diff", "diff")] * 2)
        else:
            metric.update([], [])
        score = metric.compute()["averages"]["avg"]["score"]
        torch.distributed.destroy_process_group()
        return score

    assert run_ranks(2, work) == [50.0, 50.0]


def test_a_metric_leaves_nothing_in_a_checkpoint_and_starts_again_after_a_reset() -> None:
    metric = GroundingAccuracy(TASK_UNITS, RULE, AVERAGES)
    metric.update([1.0], [("diff", "diff")])
    assert metric.state_dict() == {}
    metric.reset()
    assert int(metric.count.sum()) == 0


def counted(hits: dict[str, dict[str, list[bool]]]) -> dict[str, dict[str, tuple[int, int]]]:
    return {c: {u: (sum(values), len(values)) for u, values in units.items()} for c, units in hits.items()}


def test_intervals_are_seeded_and_those_of_resampled_questions() -> None:
    hits = {"x": {"u": [True] * 30 + [False] * 70}, "y": {"u": [True] * 5 + [False] * 5}}
    rule, averages = Rule(source="test"), {"avg": ("x", "y")}
    first = bootstrap_intervals(counted(hits), rule, averages, seed=3)
    assert first == bootstrap_intervals(counted(hits), rule, averages, seed=3)
    assert first != bootstrap_intervals(counted(hits), rule, averages, seed=4)
    rng = np.random.default_rng(0)  # questions drawn one by one
    draws = {c: rng.choice(values["u"], (4000, len(values["u"]))).mean(1) * 100 for c, values in hits.items()}
    for name, drawn in (("x", draws["x"]), ("avg", (draws["x"] + draws["y"]) / 2)):
        assert first[name] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1.5)
