"""The place of a step in the whole, and the time left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.persistence.durations import OUTLOOK, Outlook
from experiments.runs.subprocess_steps import Plan, Step


@pytest.fixture
def steps(tmp_path: Path) -> list[Step]:
    titles = ("base: MIG-Bench", "grpo: training", "grpo: MIG-Bench")
    return [Step(title, tmp_path / f"{number}.json", ("x",), ()) for number, title in enumerate(titles)]


MINUTES = {"base: MIG-Bench": 1, "grpo: training": 10, "grpo: MIG-Bench": 1}


def outlook_of(plan: Plan, step: Step) -> Outlook:
    return Outlook(**json.loads(plan.begin(step)[OUTLOOK]))


def test_a_step_knows_its_number_and_the_times(steps: list[Step]) -> None:
    plan = Plan(steps, MINUTES)
    outlook = outlook_of(plan, steps[1])
    assert (outlook.stage, outlook.expected, outlook.later) == ("2 of 3, grpo: training", 600, 60)
    assert outlook.evidence == pytest.approx(108), "a part of the whole"
    assert plan.left_text(steps[0]) == "; about 12 min left of all stages"


def test_a_slower_machine_corrects_the_time_left(steps: list[Step]) -> None:
    plan = Plan(steps, MINUTES)
    plan.end(steps[0], 120.0)
    # 120 s in place of 60 s, and 108 s as expected: 228 s in place of 168 s. Eleven minutes become fifteen.
    assert plan.left_text(steps[1]) == "; about 15 min left of all stages"
    plan.end(steps[1], 1200.0)
    assert plan.pace() == pytest.approx((108 + 1320) / (108 + 660)), "a long step weighs more"


def test_without_expectations_only_the_number_is_said(steps: list[Step]) -> None:
    plan = Plan(steps, {"grpo: training": 10})
    assert outlook_of(plan, steps[0]).later is None and plan.left_text(steps[0]) == ""


def test_unknown_times_follow_from_the_steps_that_have_run(tmp_path: Path) -> None:
    titles = ("base: MIG-Bench", "sft: training", "sft: MIG-Bench") * 2  # of two seeds
    steps = [Step(title, tmp_path / f"{number}.json", ("x",), ()) for number, title in enumerate(titles)]
    plan = Plan(steps, {})
    plan.end(steps[0], 60.0)
    assert outlook_of(plan, steps[1]).expected is None and plan.left_text(steps[1]) == ""
    plan.end(steps[1], 300.0)
    assert plan.left_text(steps[2]) == "; about 8 min left of all stages", "60 + 60 + 300 + 60"
