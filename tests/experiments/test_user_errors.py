"""Mistakes of a user: each is answered in at most five lines with what, where, the value and the cure. Nothing runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from datamodules.checkpoints.model_folder import ModelError, local_folder
from experiments import ablations, ask_model, evaluate, generate_synthetic, pipeline, sweep, synthesize, train
from experiments.runs.usage_errors import explain, suggest
from tests.experiments.conftest import Workbench
from tests.outside_make import outside_make

ROOT = Path(__file__).resolve().parents[2]
NANO = "experiments/configs/nano"
Main = Callable[[list[str]], None]


@pytest.fixture(autouse=True)
def one_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])  # LightningCLI warns when it is given arguments in two ways
    monkeypatch.chdir(ROOT)


def message_of(main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command ends. Fails if the command prints a usage or ends as if it had worked."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    message, printed = str(caught.value.code), capsys.readouterr()
    assert isinstance(caught.value.code, str), "the message is printed to stderr, and the exit code is 1"
    for text in (message, printed.err, printed.out):
        assert "usage:" not in text and "Traceback" not in text and "NestedArg" not in text
    return message


def assert_short(message: str, *parts: str) -> None:
    assert 1 <= len(message.splitlines()) <= 5, message
    for part in parts:
        assert part in message


# Command, configuration, its further arguments, and what the message must have: the value, and the cure.
TYPOS: list[tuple[Main, str, list[str], tuple[str, ...]]] = [
    (train.main, "cot_sft", ["--model.learning_rat=0.01"], ("learning_rat=0.01", "did you mean model.learning_rate?")),
    (train.main, "cot_sft", ["--model.lora.rnk=4"], ("model.lora.rnk=4", "did you mean model.lora.rank?")),
    (train.main, "cot_sft", ["--model.lora=abc"], ("model.lora='abc'", "a group of settings")),
    (train.main, "cot_sft", ["--trainer.max_stps=3"], ("--trainer.max_stps=3", "did you mean trainer.max_steps?")),
    (train.main, "cot_sft", ["--data.batch_sise=3"], ("--data.batch_sise=3", "did you mean data.batch_size?")),
    (train.main, "cot_sft", ["--expriment", "mine"], ("--expriment", "did you mean experiment?")),
    (train.main, "cot_sft", ["--data.style=thnk"], ("data.style='thnk'", "did you mean think?")),
    (train.main, "cot_sft", ["--model.learning_rate=high"], ("model.learning_rate='high'", "a number")),
    (train.main, "cot_sft", ["--seed_everything=abc"], ("seed_everything='abc'", "a whole number")),
    (evaluate.main, "eval", ["--modl", "x"], ("--modl", "did you mean model?")),
    (evaluate.main, "eval", ["--form.style=thnk"], ("form.style='thnk'", "did you mean think?")),
    (evaluate.main, "eval", ["--endpoint.base_ur=x"], ("endpoint.base_ur=x", "did you mean endpoint.base_url?")),
    (evaluate.main, "eval", ["--endpoint.timeout=-1"], ("timeout=-1", "must be greater than 0")),
    (evaluate.main, "eval", ["--bench=blinkk", "--replicas=false"], ("bench='blinkk'", "blink")),
    (evaluate.main, "eval", ["--device=cuda", "--replicas=false"], ("device='cuda'", "--device=cpu")),
    (evaluate.main, "eval", ["--device=gpu", "--replicas=false"], ("device='gpu'", "cuda:0")),
    (evaluate.main, "eval", ["--data_root=data/nope", "--replicas=false"], ("data/nope",)),
    (pipeline.main, "pipeline", ["--trainer.max_steps=3"], ("--trainer.max_steps=3", "--overrides.grpo=")),
    (pipeline.main, "pipeline", ["--seed=abc"], ("seed='abc'", "a whole number")),
    (ablations.main, "ablations", ["--sedes=[1]"], ("--sedes", "did you mean seeds?")),
    (ablations.main, "ablations", ["--only=[sfft]"], ("'sfft'", "'sft'")),
    (sweep.main, "sweep", ["--trails", "2"], ("--trails", "did you mean trials?")),
    (synthesize.main, "synthesize", ["--limits=3"], ("--limits=3", "did you mean limit?")),
    (generate_synthetic.main, "shards", ["--train_smples=3"], ("--train_smples=3", "did you mean train_samples?")),
    (ask_model.main, "", ["--model=nano", "--images=[nope.png]", "--question=Where?"], ("nope.png",)),
]


@pytest.mark.parametrize(("main", "config", "more", "parts"), TYPOS, ids=[f"{t[1]} {t[2][0]}" for t in TYPOS])
def test_a_mistake_on_the_command_line(main: Main, config: str, more: list[str], parts: tuple, capsys) -> None:
    before = sorted(ROOT.glob("outputs/*"))
    named = ["--config", f"{NANO}/{config}.yaml"] if config else []
    message = message_of(main, [*named, *more], capsys)
    assert_short(message, *parts)
    assert sorted(ROOT.glob("outputs/*")) == before, "nothing is moved or made"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("learning_rate:", "lerning_rate:", ("lerning_rate=", "did you mean model.learning_rate?")),
        ("{every_n_steps:", "{evry_n_steps:", ("evry_n_steps=", "WindowCheckpoint", "every_n_steps?")),
        ("merge_adapter.MergeAdapter", "merge_adapter.MrgeAdapter", ("MrgeAdapter", "merge_adapter.MergeAdapter?")),
        ("experiment:", "exprmnt:", ("exprmnt=nano", "did you mean experiment?")),
    ],
)
def test_a_mistake_in_a_yaml_is_named_with_its_line(old: str, new: str, parts: tuple, tmp_path, capsys) -> None:
    text = (ROOT / NANO / "cot_sft.yaml").read_text()
    number = next(k for k, line in enumerate(text.splitlines(), 1) if old in line)
    file = tmp_path / "wrong.yaml"
    file.write_text(text.replace(old, new, 1))
    assert_short(message_of(train.main, ["--config", str(file)], capsys), f"{file}, line {number}: ", *parts)


def test_a_yaml_that_is_absent_or_no_yaml(tmp_path, capsys) -> None:
    assert_short(message_of(train.main, ["--config", "nope.yaml"], capsys), "nope.yaml", "not exist")
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: {")
    assert_short(message_of(train.main, ["--config", str(tmp_path / "bad.yaml")], capsys), "bad.yaml", "line 2")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--model.lora.rank=0"], ("rank=0", "greater than 0")),
        (["--data.batch_size=1000"], ("data.batch_size=1000", "--data.batch_size=")),
        (["--model.model=models/nano-bas"], ("models/nano-bas", "did you mean 'models/nano-base'?")),
        (["--trainer.accelerator=gpu"], ("trainer.accelerator='gpu'", "--trainer.accelerator=cpu")),
        (["--data.shards=data/nope"], ("data/nope", "manifest.json")),
    ],
)
def test_settings_that_cannot_be_run_are_refused_before_a_finished_run_is_moved(
    workbench: Workbench, more: list[str], parts: tuple, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = workbench.outputs / "tiny" / "cot_sft"
    folder.mkdir(parents=True)
    (folder / "started.json").write_text('{"key": "of another run"}')
    message = message_of(train.main, ["--config", workbench.training("cot_sft"), *more], capsys)
    assert_short(message, *parts)
    assert [each.name for each in folder.parent.iterdir() if not each.name.startswith(".")] == ["cot_sft"]


def test_samples_without_thinking_name_both_cures(workbench: Workbench, capsys) -> None:
    settings = yaml.safe_load(Path(workbench.training("cot_sft")).read_text())
    settings["data"] |= {"shards": str(workbench.root / "plain_shards"), "style": "think"}
    from datamodules.streaming.shard_reader import ShardReader
    from datamodules.streaming.shard_writer import ShardWriter

    reader = ShardReader([str(workbench.root / "shards")])
    with ShardWriter(workbench.root / "plain_shards") as writer:
        for number in range(reader.count):
            loaded = reader.read(number)
            object.__setattr__(loaded.sample, "thinking", None)
            writer.add(loaded)
    config = workbench.write_yaml("plain", settings)
    message = message_of(train.main, ["--config", config, "--trainer.logger=false"], capsys)
    assert_short(message, "missing_thinking", "--data.style=answer", "make synthesize")


def test_a_path_below_a_folder_here_is_not_asked_of_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "nano").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no folder 'outputs/nanoo' in it; did you mean 'outputs/nano'\?"):
        local_folder("outputs/nanoo")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("variable", ["ARG=--trainer.max_steps=1", "CONFG=a.yaml"])
def test_a_misspelt_make_variable_starts_nothing(variable: str) -> None:
    command = ["make", "-n", "grpo", variable]
    ended = subprocess.run(command, cwd=ROOT, env=outside_make(), capture_output=True, text=True)
    assert ended.returncode != 0 and not ended.stdout
    assert_short(ended.stderr.strip(), variable.partition("=")[0], "ARGS", "CONFIG")


@pytest.mark.parametrize("model", ["experiments/nope", "/nope", "experiments"])
def test_the_vllm_server_checks_its_model_before_it_installs(model: str, tmp_path) -> None:
    command = [sys.executable, "lightning_modules/serving/vllm_server.py", "--venv", str(tmp_path / "venv")]
    ended = subprocess.run([*command, "--model", model], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and not (tmp_path / "venv").exists()
    assert_short(ended.stderr.strip(), f"--model={model}")


def test_suggestions_know_the_last_part_of_a_nested_name() -> None:
    assert suggest("model.beta", ["model.loss.kl_beta", "model.seed"]) == "; did you mean model.loss.kl_beta?"
    assert suggest("model.xyzzy", ["model.loss.kl_beta", "model.seed"]) == ""


def test_a_message_of_unknown_form_is_cut_and_not_lost() -> None:
    text = explain("\n".join(["", *(f"line {k} {'x' * 400}" for k in range(30))]))
    assert len(text.splitlines()) == 5 and re.match("line 0 x+", text)


def test_a_misspelt_field_of_a_settings_group_is_told_with_its_full_name() -> None:
    config = str(ROOT / "experiments/configs/nano/grpo.yaml")
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", config, "--model.loss.kl_bta=1"])
    assert str(caught.value) == "--model.loss.kl_bta=1: no such setting; did you mean model.loss.kl_beta?"
