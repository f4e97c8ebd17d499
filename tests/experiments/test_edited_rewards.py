"""`make grpo` after its rewards were edited: it asks, and never answers with the old numbers. With real processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.persistence.source_code import PACKAGES, ROOT
from experiments.runs import metrics_csv
from tests.experiments.conftest import Workbench
from tests.outside_make import outside_make

REWARDS = "lightning_modules/rl/rewards/box_rewards.py"
OLD, NEW = "return completion.score.iou", "return completion.score.iou + 0.25"


@pytest.fixture
def make_grpo(workbench: Workbench) -> Callable[..., subprocess.CompletedProcess]:
    """make_grpo("REDO=1") runs `make grpo` in a copy of the project, whose files a test may edit."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    copy = workbench.root / "project"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", copy)
    config = workbench.training("grpo")
    stamp = f"{sys.prefix}/.installed"  # nothing is installed: this Python has everything

    def run(*words: str) -> subprocess.CompletedProcess:
        given = [f"VENV={sys.prefix}", f"CONFIG={config}", "ARGS=--log_to=csv --trainer.max_steps=1"]
        # The copy comes first on the path: the project may be installed in this environment, too.
        environment = outside_make() | {"PYTHONPATH": str(copy)}
        command = ["make", "-o", stamp, "grpo", *given, *words]
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)

    return run


def rewards_of(phase: Path) -> list[float]:
    return [value for _, value in metrics_csv.read_curve(metrics_csv.read_rows(phase), "reward/accuracy")]


@pytest.mark.slow
def test_edited_rewards_are_asked_about_and_then_trained_with(workbench: Workbench, make_grpo: Callable) -> None:
    phase, file = workbench.outputs / "tiny/grpo", workbench.root / "project" / REWARDS
    first = make_grpo()
    assert first.returncode == 0, first.stderr[-2000:]
    assert "already done" in make_grpo().stdout
    before, done = rewards_of(phase), (phase / "done.json").read_bytes()

    text = file.read_text()
    assert OLD in text
    file.write_text(text.replace(OLD, NEW))
    asked = make_grpo()
    assert asked.returncode != 0 and "already done" not in asked.stdout
    assert REWARDS in asked.stderr and "KEEP=1" in asked.stderr and "REDO=1" in asked.stderr
    assert (phase / "done.json").read_bytes() == done, "nothing is moved or lost"

    again = make_grpo("REDO=1")
    assert again.returncode == 0 and "already done" not in again.stdout, again.stderr[-2000:]
    assert rewards_of(phase) == pytest.approx([value + 0.25 for value in before]), "the new reward has been used"
    assert len(list(phase.parent.glob("grpo.*/done.json"))) == 1, "the old run is kept aside"
