"""The settings of all stages are checked before the dataset is generated, and before any stage runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.conftest import ROOT

NANO = "experiments/configs/nano"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["pipeline", "--overrides.grpo=--model.loss.kl_bta=1"],
            "grpo: training: --model.loss.kl_bta=1: no such setting; did you mean model.loss.kl_beta?",
        ),
        (
            ["smoke", "--overrides.cot_sft=--data.shards=data/nope"],
            "cot_sft: training: these settings cannot be run:\n  - data.shards='data/nope': no manifest.json",
        ),
        (
            ["ablations", "--overrides.sft=--model.lora.rank=0", "--only=[sft]"],
            "sft: training: these settings cannot be run:\n  - model.lora.rank=0 must be greater than 0",
        ),
        (
            ["pipeline", "--overrides.evaluation=--device=gpu"],
            "base: MIG-Bench: these settings cannot be run:\n  - device='gpu'",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_in_a_stage_is_told_before_anything_is_made(command: list[str], message: str, tmp_path: Path) -> None:
    config, *flags = command
    module = "experiments.ablations" if config == "ablations" else "experiments.pipeline"
    words = [f"--config={NANO}/{config}.yaml", f"--outputs={tmp_path}", *flags]
    data = sorted(ROOT.glob("data/*"))
    ended = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and ended.stdout == "== checking the settings of all stages\n"
    assert message in ended.stderr and len(ended.stderr.splitlines()) <= 5, ended.stderr
    assert sorted(ROOT.glob("data/*")) == data and not list(tmp_path.glob("nano/*"))
