"""What Optuna is asked for: each method, early stopping, and that a study made anew goes on as the old one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from experiments.sweeps.plan import SweepPlan, read_plan
from experiments.sweeps.study import Study
from tests.experiments.sweeps.test_plan import write

NUMBERS = {
    "a": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0},
    "b": {"values": ["x", "y", "z"]},
    "c": {"min": 0, "max": 9},
}


def run_trial(study: Study, plan: SweepPlan, latent: dict | None = None) -> tuple[dict, dict, float]:
    """One trial of a made-up objective that is best at a = 1 and c = 9: (latent, values, its value)."""
    latent = study.begin(latent)
    values = plan.values(latent)
    value = values["a"] + values["c"] + (values["b"] == "y") / 10
    study.report(0, value / 2)
    study.end("complete", value)
    return latent, values, value


@pytest.mark.parametrize("method", ["random", "bayes", "grid"])
def test_equal_seeds_propose_the_same_also_after_a_restart(tmp_path: Path, method: str) -> None:
    parameters = NUMBERS if method != "grid" else NUMBERS | {"a": {"values": [0.1, 0.2, 0.3, 0.4]}}
    plan = read_plan(write(tmp_path, method=method, parameters=parameters))
    study, other = Study(plan, 5), Study(plan, 6)
    whole = [run_trial(study, plan) for _ in range(14)]
    assert [values for _, values, _ in whole] != [run_trial(other, plan)[1] for _ in range(14)]
    again = Study(plan, 5)
    for latent, _, _ in whole[:9]:
        run_trial(again, plan, latent)
    assert [run_trial(again, plan) for _ in range(5)] == whole[9:]


def test_a_grid_covers_every_combination_once(tmp_path: Path) -> None:
    parameters = {"a": {"values": [0.1, None, "x"]}, "b": {"min": 1, "max": 2}, "c": {"value": 7}}
    plan = read_plan(write(tmp_path, method="grid", parameters=parameters))
    study, seen = Study(plan), []
    for _ in range(plan.grid_size()):
        seen.append(tuple(plan.values(study.begin()).values()))
        study.end("complete", 1.0)
    assert sorted(seen, key=str) == sorted(itertools.product([0.1, None, "x"], [1, 2], [7]), key=str)


def test_bayes_finds_better_settings_than_chance(tmp_path: Path) -> None:
    means = {}
    for method in ("random", "bayes"):
        plan = read_plan(write(tmp_path, method=method, parameters=NUMBERS))
        study = Study(plan, 0)
        means[method] = sum([run_trial(study, plan)[2] for _ in range(40)][20:]) / 20
    assert means["bayes"] > means["random"] + 1


def test_a_goal_to_minimise_is_kept(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, method="bayes", parameters=NUMBERS, metric={"name": "loss"}))
    study = Study(plan, 0)
    assert sum([run_trial(study, plan)[2] for _ in range(40)][20:]) / 20 < 3


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
