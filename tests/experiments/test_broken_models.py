"""Every command refuses a model that would run on random weights, in a few lines and before it writes a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.checkpoints.model_folder import ModelError
from experiments import evaluate, train
from experiments.runs.command_line import train_cli
from lightning_modules.serving.transformers_server import local_server, sampling_folder
from tests.broken_models import change_tensors
from tests.experiments.conftest import Workbench
from tests.image_text_models import qwen2_vl, save_model

LOST = "layers.1.mlp.up_proj.weight"
SPOILT = "layers.0.input_layernorm.weight"


def lose(folder: Path) -> str:
    """Take a tensor out of the weights; its name."""
    change_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(LOST)})
    return LOST


def spoil(folder: Path) -> str:
    """Make a value of a tensor not a number; its name."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(value for name, value in tensors.items() if name.endswith(SPOILT))[3] = float("nan")
        return tensors

    change_tensors(folder, change)
    return SPOILT


@pytest.fixture
def policy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "policy")


def refused(command: Callable[[list[str]], object], arguments: list[str], words: str) -> str:
    """The message that ends the command, of at most five lines."""
    with pytest.raises(SystemExit) as caught:
        command(arguments)
    message = str(caught.value)
    assert words in message and len(message.splitlines()) <= 5, message
    return message


@pytest.mark.parametrize("phase", ["cot_sft", "grpo"])
@pytest.mark.parametrize("broken", [lose, spoil])
def test_training(workbench: Workbench, policy: Path, phase: str, broken: Callable[[Path], str]) -> None:
    name = broken(policy)
    config = workbench.training(phase, model=str(policy))
    refused(train.main, ["--config", config, "--trainer.logger=false"], name)
    assert not list(workbench.outputs.rglob("done.json")) and not list(workbench.outputs.rglob("merged"))
    if broken is lose:  # known from headers, before the run's folder is made
        assert not workbench.outputs.exists()


@pytest.mark.parametrize("broken", [lose, spoil])
def test_mig_bench(workbench: Workbench, policy: Path, broken: Callable[[Path], str]) -> None:
    name = broken(policy)
    refused(
        evaluate.main, [f"--model={policy}", f"--data_root={workbench.root}", f"--output={workbench.outputs}"], name
    )
    assert not list(workbench.outputs.rglob("result.json"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("broken", [lose, spoil])
def test_all_benchmarks(
    policy: Path, tmp_path: Path, family: str, broken: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = policy if family == "qwen2_5_vl" else save_model(qwen2_vl, tmp_path / "other")
    name = broken(model)
    where = [f"--data_root={tmp_path}", "--replicas=true", f"--output={tmp_path / 'out'}", "--limit=1"]
    refused(evaluate.main, [f"--model={model}", "--bench=blink", *where], name)
    assert not list(tmp_path.glob("out/*/result*.json"))


def test_all_benchmarks_asked_by_two_processes(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    where = [f"--data_root={tmp_path}", "--replicas=true", f"--output={tmp_path / 'out'}", "--limit=1", "--processes=2"]
    refused(evaluate.main, [f"--model={policy}", "--bench=blink", *where], spoil(policy))


@pytest.mark.parametrize("broken", [lose, spoil])
def test_a_teacher(policy: Path, tmp_path: Path, broken: Callable[[Path], str]) -> None:
    name = broken(policy)
    with pytest.raises(ModelError, match=name), local_server(str(policy), tmp_path / "work"):
        pass
    assert not (tmp_path / "work").exists()


def test_a_teachers_configuration_names_no_attention(policy: Path, tmp_path: Path) -> None:
    config = json.loads((policy / "config.json").read_text())
    named = {"_attn_implementation": "owner/kernel"}
    changed = config | named | {"vision_config": config["vision_config"] | named}
    (policy / "config.json").write_text(json.dumps(changed))
    served = sampling_folder(policy, tmp_path / "served")
    assert json.loads((served / "config.json").read_text()) == config
    assert (served / "model.safetensors").resolve() == policy / "model.safetensors"


def test_settings_of_an_adapter_are_told_with_the_other_faults(workbench: Workbench) -> None:
    config = workbench.training("cot_sft", learning_rate=-1.0)
    more = ["--model.lora.rank=0", "--model.lora.targets=[q_proj,vproj]", "--data.batch_size=0"]
    message = refused(train.main, ["--config", config, *more], "lora.rank=0")
    assert all(part in message for part in ("'vproj' matches no linear layer", "learning_rate=-1.0", "batch_size=0"))


def test_all_linear_is_a_word_on_the_command_line(workbench: Workbench) -> None:
    class Parsed(train_cli.TrainCLI):
        def instantiate_classes(self) -> None:
            pass

    settings = Parsed(["--config", workbench.training("cot_sft"), "--model.lora.targets=all-linear"]).settings()
    assert settings["model"]["init_args"]["lora"]["targets"] == "all-linear"
