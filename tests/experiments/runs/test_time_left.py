"""The time left in the log of `make pipeline` on the nano default, replayed from the recorded times of whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from datamodules.persistence import durations
from datamodules.persistence.durations import OUTLOOK, Outlook
from datamodules.persistence.progress_lines import EVERY_SECONDS
from experiments.runs import subprocess_steps
from experiments.runs.subprocess_steps import Plan, Step

ROOT = Path(__file__).resolve().parents[3]
MINUTES = yaml.safe_load((ROOT / "experiments/configs/nano/pipeline.yaml").read_text())["minutes"]
TITLES = [title for title in MINUTES if "," not in title]
# Seconds of the stages in whole runs on two CPU cores, and the share of GRPO's training until the end of its rejection
# sampling. To be recorded again whenever the settings of a stage change its time, together with the YAML's minutes.
RECORDED = {
    "seed 0": ([27, 219, 33, 566, 30], 0.39),
    "seed 7": ([28, 231, 34, 584, 35], 0.39),
}
# By which factor each stage was slower in runs beside other work, recorded with earlier settings against a run alone.
# The other work came and went, so that it slowed down some of the stages, but not all.
SLOWER = {
    "slow at first": [2.8, 1.0, 0.9, 1.0, 0.9],
    "slow in the first half": [1.8, 1.8, 1.6, 1.1, 0.9],
    "slow in GRPO": [1.5, 1.1, 1.2, 1.4, 1.2],
    "a little slower everywhere": [1.7, 1.2, 1.3, 1.2, 1.3],
}
QUIET, SHARE = RECORDED["seed 0"]
BESIDE = {
    name: ([round(one * factor) for one, factor in zip(QUIET, factors, strict=True)], SHARE)
    for name, factors in SLOWER.items()
}
MACHINES = {f"{factor} x": ([60 * factor * MINUTES[title] for title in TITLES], SHARE) for factor in (0.5, 2, 3)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=0.0)
    time = SimpleNamespace(time=lambda: now.seconds)
    monkeypatch.setattr(durations, "time", time)
    monkeypatch.setattr(subprocess_steps, "time", time)
    return now


def estimates(
    seconds: list[float], share: float, folder: Path, clock: SimpleNamespace
) -> Iterator[tuple[float, float]]:
    """(seconds since the start, estimated seconds left) at each line, for stages that proceed evenly."""
    steps = [Step(title, folder / f"{number}.json", ("x",), ()) for number, title in enumerate(TITLES)]
    plan, start = Plan(steps, MINUTES), 0.0
    for step, whole in zip(steps, seconds, strict=True):
        clock.seconds = start
        yield start, plan.seconds_of(steps[steps.index(step) :])
        outlook = Outlook(**json.loads(plan.begin(step)[OUTLOOK]))
        for count in range(1, int(whole / EVERY_SECONDS) + 1):
            spent = count * EVERY_SECONDS
            clock.seconds = start + spent
            if step.title == "grpo: training" and spent < share * whole:
                yield clock.seconds, outlook.seconds_left(share * whole - spent, "rejection sampling")
            else:
                yield clock.seconds, outlook.seconds_left(whole - spent)
        plan.end(step, whole)
        (folder / f"{steps.index(step)}.json").write_text(
            json.dumps({"key": step.key(), "done": True, "seconds": whole})
        )
        start += whole


@pytest.mark.parametrize("name", [*RECORDED, *BESIDE, *MACHINES])
def test_after_a_tenth_of_a_run_the_time_left_is_right_within_a_factor_of_one_and_a_half(
    name: str, tmp_path: Path, clock: SimpleNamespace
) -> None:
    seconds, share = (RECORDED | BESIDE | MACHINES)[name]
    total = sum(seconds)
    lines = estimates(seconds, share, tmp_path, clock)
    judged = [(at, left, total - at) for at, left in lines if total / 10 <= at < total]
    assert len(judged) > 10
    wrong = [(at, left, true) for at, left, true in judged if not 1 / 1.5 <= left / true <= 1.5]
    assert not wrong


def test_a_stage_of_unknown_length_does_not_change_the_expected_time_of_later_ones(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    """Without `minutes`, a long stage is guessed from a short one of its kind, which is no measure of the machine."""
    steps = [Step(title, tmp_path / f"{number}.json", ("x",), ()) for number, title in enumerate(TITLES)]
    plan = Plan(steps, {})
    for step, seconds in zip(steps[:3], (30, 240, 30), strict=True):
        plan.end(step, seconds)
        (tmp_path / f"{steps.index(step)}.json").write_text(
            json.dumps({"key": step.key(), "done": True, "seconds": seconds})
        )
    outlook = Outlook(**json.loads(plan.begin(steps[3])[OUTLOOK]))
    clock.seconds = 1200.0
    assert outlook.seconds_left(1200.0) == 1200 + 30


def test_the_parts_of_a_step_are_told_to_its_process(tmp_path: Path) -> None:
    step = Step("grpo: training", tmp_path / "a.json", ("x",), ())
    plan = Plan([step], {"grpo: training": 10, "grpo: training, rejection sampling": 6, "grpo: MIG-Bench": 1})
    assert json.loads(plan.begin(step)[OUTLOOK])["parts"] == {"rejection sampling": 360}
    assert plan.seconds_of([step]) == 600, "a part is within its step"
