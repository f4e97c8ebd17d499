"""What Optuna is asked for: each method, early stopping, and that a study made anew goes on as the old one."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from experiments.sweeps.plan import read_plan
from experiments.sweeps.study import Study
from tests.experiments.sweeps.test_plan import write

NUMBERS = {
    "a": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0},
    "b": {"values": ["x", "y", "z"]},
    "c": {"min": 0, "max": 9},
}


def run_trial(study: Study, known: dict | None = None) -> tuple[dict, float]:
    """One trial of a made-up objective that is best at a = 1 and c = 9: (its parameters, its value)."""
    values = study.begin(known)
    value = values["a"] + values["c"] + (values["b"] == "y") / 10
    study.report(0, value / 2)
    study.end("complete", value)
    return values, value


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"values": [0.0, 0.5, "a", None]}, {0.0, 0.5, "a", None}),
        ({"min": 2, "max": 5}, {2, 3, 4, 5}),
        ({"distribution": "q_uniform", "min": 0.6, "max": 1.2, "q": 0.1}, {0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2}),
        ({"distribution": "q_uniform", "min": 2, "max": 6, "q": 2}, {2, 4, 6}),
    ],
)
def test_discrete_distributions_give_all_their_values_and_no_others(tmp_path: Path, fields: dict, allowed) -> None:
    assert set(drawn(tmp_path, fields, 100)) == allowed


@pytest.mark.parametrize(
    ("fields", "low", "high", "median"),
    [
        ({"min": 0.0, "max": 2.0}, 0, 2, 1.0),
        ({"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}, 0.001, 0.1, 0.01),
    ],
)
def test_continuous_distributions_have_their_bounds_and_median(
    tmp_path: Path, fields: dict, low: float, high: float, median: float
) -> None:
    values = drawn(tmp_path, fields, 300)
    assert low <= min(values) and max(values) <= high
    assert statistics.median(values) == pytest.approx(median, rel=0.2)


def drawn(folder: Path, fields: dict, count: int) -> list:
    """Values that a random search draws."""
    study, values = Study(read_plan(write(folder, parameters={"p": fields}))), []
    for _ in range(count):
        values.append(study.begin()["p"])
        study.end("failed")
    return values


@pytest.mark.parametrize("method", ["random", "bayes", "grid"])
def test_equal_seeds_propose_the_same_also_after_a_restart(tmp_path: Path, method: str) -> None:
    parameters = NUMBERS if method != "grid" else NUMBERS | {"a": {"values": [0.1, 0.2, 0.3, 0.4]}}
    plan = read_plan(write(tmp_path, method=method, parameters=parameters))
    study, other = Study(plan, 5), Study(plan, 6)
    whole = [run_trial(study) for _ in range(14)]
    assert [values for values, _ in whole] != [run_trial(other)[0] for _ in range(14)]
    again = Study(plan, 5)
    for values, _ in whole[:9]:
        run_trial(again, values)
    assert [run_trial(again) for _ in range(5)] == whole[9:]


def test_a_grid_covers_every_combination_once(tmp_path: Path) -> None:
    parameters = {"a": {"values": [0.1, None, "x"]}, "b": {"min": 1, "max": 2}, "c": {"value": 7}}
    plan = read_plan(write(tmp_path, method="grid", parameters=parameters))
    study, seen = Study(plan), []
    for _ in range(plan.grid_size()):
        seen.append(tuple(study.begin().values()))
        study.end("complete", 1.0)
    assert sorted(seen, key=str) == sorted(itertools.product([0.1, None, "x"], [1, 2], [7]), key=str)


def test_bayes_finds_better_settings_than_chance(tmp_path: Path) -> None:
    means = {}
    for method in ("random", "bayes"):
        plan = read_plan(write(tmp_path, method=method, parameters=NUMBERS))
        study = Study(plan, 0)
        means[method] = sum([run_trial(study)[1] for _ in range(40)][20:]) / 20
    assert means["bayes"] > means["random"] + 1


def test_a_goal_to_minimise_is_kept(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, method="bayes", parameters=NUMBERS, metric={"name": "loss"}))
    study = Study(plan, 0)
    assert sum([run_trial(study)[1] for _ in range(40)][20:]) / 20 < 3


def test_a_trial_that_is_not_among_the_best_is_stopped_at_a_band(tmp_path: Path) -> None:
    early = {"type": "hyperband", "min_iter": 1, "eta": 2}
    plan = read_plan(write(tmp_path, parameters=NUMBERS, early_terminate=early))
    study, stopped = Study(plan), []
    for level in (5.0, 4.0, 6.0, 5.5, 1.0):
        study.begin()
        stopped.append(next((index for index in range(5) if study.report(index, level + index / 10)), None))
        study.end("complete" if stopped[-1] is None else "pruned", level)
    # Bands are the first, second and fourth value. The first trial has no rival; 5.5 is the second best of four at the
    # first band, and not the best of three at the second.
    assert stopped == [None, 0, None, 1, 0]


def test_without_early_terminate_nothing_is_stopped(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, parameters=NUMBERS))
    study = Study(plan)
    for level in (5.0, 1.0):
        study.begin()
        assert not any(study.report(index, level) for index in range(9))
        study.end("complete", level)
