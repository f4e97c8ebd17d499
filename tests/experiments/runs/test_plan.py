"""The place of a step in the whole, and the time left."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.persistence.durations import LATER_SECONDS, STAGE
from experiments.runs.subprocess_steps import Plan, Step


@pytest.fixture
def steps(tmp_path: Path) -> list[Step]:
    titles = ("base: MIG-Bench", "grpo: training", "grpo: MIG-Bench")
    return [Step(title, tmp_path / f"{number}.json", ("x",), ()) for number, title in enumerate(titles)]


MINUTES = {"base: MIG-Bench": 1, "grpo: training": 10, "grpo: MIG-Bench": 1}


def test_a_step_knows_its_number_and_the_time_of_later_steps(steps: list[Step]) -> None:
    plan = Plan(steps, MINUTES)
    assert plan.begin(steps[1]) == {STAGE: "2 of 3, grpo: training", LATER_SECONDS: "60"}
    assert plan.left_text(steps[0]) == "; about 12 min left of all stages"


def test_a_slower_machine_corrects_the_time_left(steps: list[Step]) -> None:
    plan = Plan(steps, MINUTES)
    plan.end(steps[0], 120.0)
    assert plan.left_text(steps[1]) == "; about 22 min left of all stages"


def test_without_expectations_only_the_number_is_said(steps: list[Step]) -> None:
    plan = Plan(steps, {"grpo: training": 10})
    assert plan.begin(steps[0]) == {STAGE: "1 of 3, base: MIG-Bench"} and plan.left_text(steps[0]) == ""
