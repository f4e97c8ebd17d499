from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import killed_pipeline, run_chaos
from tests.chaos.compare_runs import differences
from tests.experiments.conftest import ROOT


def finished(folder: Path) -> Path:
    """An experiment of one stage, in small."""
    stage = folder / "grpo"
    (stage / "merged").mkdir(parents=True)
    (stage / "merged/model.safetensors").write_bytes(b"weights")
    answers = stage / "benchmarks/mig_bench/predictions.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "y"}\n')
    (stage / "attempts/0").mkdir(parents=True)
    (stage / "attempts/0/metrics.jsonl").write_text('{"step": 0, "grpo/kl": 0.5, "speed/data_wait": 1.0}\n')
    (stage / "wandb/offline-run-1-abc").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"stages": [{"name": "grpo", "avg": 5, "seconds": 1.0}]}))
    return folder


def test_times_and_the_order_of_answers_are_no_difference(tmp_path: Path) -> None:
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b")
    (second / "results.json").write_text(json.dumps({"stages": [{"name": "grpo", "avg": 5, "seconds": 9.0}]}))
    (second / "grpo/benchmarks/mig_bench/predictions.jsonl").write_text(
        '{"id": "b", "text": "y"}\n{"id": "a", "text": "x"}\n'
    )
    (second / "grpo/attempts/0/metrics.jsonl").write_text('{"step": 0, "grpo/kl": 0.5, "speed/data_wait": 2.0}\n')
    assert differences(first, second, ("grpo",)) == []


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("results.json", '{"stages": [{"name": "grpo", "avg": 6, "seconds": 1.0}]}', "results.json: stages"),
        ("grpo/merged/model.safetensors", "other", "merged model: model.safetensors"),
        ("grpo/benchmarks/mig_bench/predictions.jsonl", '{"id": "a", "text": "x"}\n', "answers: b"),
        ("grpo/attempts/1/metrics.jsonl", '{"step": 0, "grpo/kl": 0.6}\n', "metrics: 0: grpo/kl: 0.5 is 0.6"),
        ("grpo/rejection_sampling/kept.jsonl", '{"id": "a"}\n', "kept list"),
        ("grpo/wandb/offline-run-2-xyz/x", "", "W&B has the runs ['abc', 'xyz']"),
    ],
)
def test_every_difference_is_found(tmp_path: Path, file: str, content: str, words: str) -> None:
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b")
    (second / file).parent.mkdir(parents=True, exist_ok=True)
    (second / file).write_text(content)
    (found,) = differences(first, second, ("grpo",))
    assert words in found


def test_kills_are_spread_over_all_phases_in_their_order() -> None:
    planned = run_chaos.plan_kills(20)
    assert [phase for phase in run_chaos.PHASES for _ in range(planned.count(phase))] == planned
    assert {phase: planned.count(phase) for phase in run_chaos.PHASES} == run_chaos.PHASES


def test_one_rank_or_all_are_found_and_killed(tmp_path: Path) -> None:
    pipeline = killed_pipeline.Pipeline(tmp_path / "config.yaml", tmp_path / "outputs")
    child = "import time; time.sleep(60)  # experiments.train --phase grpo"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])  # experiments.pipeline"
    pipeline.process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, start_new_session=True)
    pipeline.sessions.add(pipeline.process.pid)
    try:
        while len(pipeline.members()) < 2:
            assert pipeline.process.poll() is None
        pipeline.kill("all", None)
        assert pipeline.wait(30) == -signal.SIGKILL
        while pipeline.members():
            pass
    finally:
        pipeline.process.kill()
        pipeline.process.wait()


def test_the_short_pipeline_is_the_nano_one_with_its_callbacks(tmp_path: Path) -> None:
    config = killed_pipeline.write_configs(tmp_path / "configs", "models/nano-base")
    assert config.is_file()
    text = (tmp_path / "configs/grpo.yaml").read_text()
    for name in ("RejectionSampling", "MIGBench", "CollapseGuard", "SaveOnInterrupt", "strategy: ddp", "accumulate: 2"):
        assert name in text
