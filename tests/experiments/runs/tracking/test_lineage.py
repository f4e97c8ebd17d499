"""W&B artefacts: data -> model -> evaluation, from a real offline run and with a stand-in for a server."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from experiments import evaluate, train
from experiments.runs.tracking import lineage
from tests.experiments.conftest import Workbench
from tests.experiments.phase_results import summary, write_mig_bench


class Online:
    """A run that accepts artefacts and keeps them."""

    settings = SimpleNamespace(_offline=False)

    def __init__(self) -> None:
        self.used: list[wandb.Artifact] = []
        self.logged: list[wandb.Artifact] = []

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact: wandb.Artifact) -> None:
        self.logged.append(artifact)


@pytest.fixture
def phase(tmp_path: Path) -> Path:
    phase = tmp_path / "outputs/nano/grpo"
    write_mig_bench(phase, summary(50.0))
    (phase / "config.yaml").write_text("model: {}\n")
    (phase / "started.json").write_text(json.dumps({"key": "k1", "commit": "abc"}))
    return phase


SHARDS = [("data/nano/sft", "0123"), ("data/nano/more", None)]


def test_data_model_and_evaluation_are_linked(phase: Path) -> None:
    training, evaluation = Online(), Online()
    lineage.log_training(training, phase, SHARDS)
    lineage.log_evaluations(
        evaluation, phase, {"mig_bench": phase / "benchmarks/mig_bench"}, "outputs/nano/grpo/merged"
    )
    (data,), (model,) = training.used, training.logged
    (input_model,), (result,) = evaluation.used, evaluation.logged
    assert [a.type for a in (data, model, result)] == ["dataset", "model", "evaluation"]
    assert model.name == input_model.name == "nano-grpo" and result.name == "nano-grpo-mig_bench"
    assert model.digest == input_model.digest, "the evaluation uses the version that the training made"
    assert model.metadata["made_from"] == [data.name] and model.metadata["commit"] == "abc"
    assert result.metadata["made_from"] == ["nano-grpo"] and result.metadata["scores"]["avg"] == 50.0
    assert set(result.manifest.entries) == {"facts.json", "result.json", "predictions.jsonl"}


def test_the_same_data_is_one_version_and_other_data_another() -> None:
    again = [("elsewhere/sft", "0123"), ("data/nano/more", None)]
    other = [("data/nano/sft", "4567"), ("data/nano/more", None)]
    assert lineage.data_facts(SHARDS)["name"] == lineage.data_facts(again)["name"]
    assert lineage.data_facts(SHARDS)["name"] != lineage.data_facts(other)["name"]


def test_long_files_stay_and_strange_names_are_allowed(phase: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MOST_BYTES", -1)
    run, folder = Online(), phase / "benchmarks/mig_bench"
    lineage.log_evaluations(run, phase.parent / "a b:c", {"shards-x": folder}, "models/m")
    (result,), (model,) = run.logged, run.used
    assert "predictions.jsonl" not in result.manifest.entries and result.name == "nano-a-b-c-shards-x"
    assert model.metadata["model"] == "models/m", "a model that was not trained here"


def test_a_refusal_is_a_warning(phase: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Online()
    run.log_artifact = lambda artifact: (_ for _ in ()).throw(wandb.errors.CommError("no room"))
    lineage.log_training(run, phase, SHARDS)
    assert "W&B has no artefact nano-grpo: CommError: no room" in caplog.text


def test_a_real_offline_run_keeps_its_artefacts(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str, dict[str, Any]]] = []
    log = wandb.Run.log_artifact

    def note(run: wandb.Run, artifact: wandb.Artifact) -> Any:
        if artifact.type in ("dataset", "model", "evaluation"):  # tables are artefacts of W&B's own
            found.append((artifact.type, artifact.name, dict(artifact.metadata)))
        return log(run, artifact)

    monkeypatch.setattr(wandb.Run, "log_artifact", note)
    train.main(["--config", workbench.training("cot_sft")])
    merged = workbench.outputs / "tiny/cot_sft/merged"
    settings = {"data_root": str(workbench.root), "model": str(merged), "decoding": {"max_new_tokens": 4}}
    evaluate.main(["--config", workbench.write_yaml("eval", settings)])
    wandb.finish()
    assert [(kind, name) for kind, name, _ in found] == [
        ("model", "tiny-cot_sft"),
        ("evaluation", "tiny-cot_sft-mig_bench"),
    ]
    assert found[0][2]["made_from"][0].startswith("data-") and found[1][2]["made_from"] == ["tiny-cot_sft"]
