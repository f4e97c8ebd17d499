"""`make smoke` from the first sample to the last table, in a folder of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_smoke_run_ends_with_scores_of_all_stages_and_the_next_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.pipeline", "--config", "experiments/configs/nano/smoke.yaml"]
    ended = subprocess.run(
        [*command, "--outputs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    stages = json.loads((tmp_path / "smoke" / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["base", "cot_sft", "grpo"]
    assert (tmp_path / "smoke" / "grpo" / "merged" / "model.safetensors").is_file()
    assert ended.stdout.count("The scores mean nothing") == 2 and "make ask MODEL=" in ended.stdout
    assert "stage 5 of 5, grpo: MIG-Bench" in ended.stdout
    assert re.search(r"\[4 of 5, grpo: training\] step 6 of 6, reward", ended.stdout), "the last line of training"
