"""Training runs that learn nothing: they end with the reason and a status other than 0, and are never done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from datamodules.persistence.files import read_json
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ChoiceAnswer
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from experiments import train
from tests.experiments.conftest import REJECTION, Workbench, run_apart
from tests.lightning_modules.grpo_modules import flat_reward, letters, use_reward


@pytest.fixture
def hopeless(monkeypatch) -> None:
    use_reward(monkeypatch, lambda *_: flat_reward(0.0, "empty"))


@pytest.fixture
def easy(monkeypatch):
    return lambda: use_reward(monkeypatch, letters)


def run(config: str, *more: str) -> str | None:
    """What the run ends with, None if it is done."""
    try:
        train.main(["--config", config, "--trainer.logger=false", *more])
    except SystemExit as end:
        assert end.code not in (0, None)
        return str(end.code)
    return None


def idle_counts(folder: Path) -> dict:
    (file,) = (folder / "checkpoints").glob("*.ckpt")
    return torch.load(file, weights_only=True)["policy_module"]["idle_windows"]


def test_a_grpo_run_without_a_signal_ends_and_can_go_on(workbench: Workbench, hopeless, easy) -> None:
    config = workbench.training("grpo", skip_zero_advantage=True, max_idle_windows=4, accumulate=2)
    folder = workbench.outputs / "tiny/grpo"
    reason = run(config, "--trainer.max_steps=2")
    assert "no group of the last 4 windows was informative: in each of 16 groups" in reason
    assert "IoU 0 32" in reason and len(reason.splitlines()) <= 5
    assert not (folder / "done.json").exists() and not (folder / "merged").exists()
    assert idle_counts(folder)["number"] == 4

    assert "no group of the last 5 windows" in run(config, "--trainer.max_steps=2"), "one more, and it ends again"
    easy()
    assert run(config, "--trainer.max_steps=2", "--model.update.max_idle_windows=9") is None
    assert (folder / "done.json").is_file() and (folder / "merged/model.safetensors").is_file()
    assert not list(folder.parent.glob("grpo.*")), "it is the same run"


def test_it_ends_as_a_process_without_a_traceback(workbench: Workbench) -> None:
    """Without a temperature to speak of, all completions of a prompt are one and the same token."""
    config, log = workbench.training("grpo", skip_zero_advantage=True, max_new_tokens=1), workbench.root / "log.txt"
    more = ("--model.update.max_idle_windows=3", "--model.rollout.temperature=1e-6", "--trainer.logger=false")
    assert run_apart(config, *more, log=log) == 1
    said = log.read_text()
    assert "every completion was cut at rollout.max_new_tokens=1" in said and "Traceback" not in said


def test_epochs_that_make_no_update_are_not_done(workbench: Workbench, hopeless) -> None:
    config = workbench.training("grpo", skip_zero_advantage=True)
    folder = workbench.outputs / "tiny/grpo"
    for _ in range(2):  # and no more when it is started again behind its end
        reason = run(config, "--trainer.max_epochs=1")
        assert "nothing was learnt: no update was made; no group of the last 6 windows" in reason
        assert not (folder / "done.json").exists() and not (folder / "merged").exists()


def test_a_run_that_merges_nothing_is_not_done_without_an_update_either(workbench: Workbench, hopeless) -> None:
    config = Path(workbench.training("grpo", skip_zero_advantage=True))
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][1:]
    config.write_text(yaml.safe_dump(settings))
    assert "no update was made" in run(str(config), "--trainer.max_epochs=1")
    assert not (workbench.outputs / "tiny/grpo/done.json").exists()


@pytest.mark.parametrize("settings", [{}, {"lora": None}], ids=["lora", "full"])
def test_updates_that_change_no_weight_are_not_done(workbench: Workbench, settings: dict) -> None:
    config = workbench.training("cot_sft", learning_rate=1e-60, **settings)  # 0 in float32
    reason = run(config)
    assert "2 updates have changed no weight of the model; learning_rate=1e-60" in reason
    folder = workbench.outputs / "tiny/cot_sft"
    assert not (folder / "done.json").exists() and not (folder / "merged").exists()
    assert "learning_rate" in run(config, "--model.learning_rate=1e-3"), "other settings are another run"
    assert run(config, "--model.learning_rate=1e-3", "--redo") is None


def test_rejection_sampling_that_keeps_nothing_ends_the_run(workbench: Workbench) -> None:
    reason = run(workbench.training("grpo", [REJECTION]))
    assert "rejection sampling kept none of 12 candidates" in reason and len(reason.splitlines()) <= 5
    assert not (workbench.outputs / "tiny/grpo/done.json").exists()


def with_answers(workbench: Workbench, num_unusable: int) -> str:
    """The tiny dataset's samples, of which the first ones ask for two boxes, or for a letter."""
    reader, folder = ShardReader(workbench.root / "shards"), workbench.root / "mixed"
    box = BoxAnswer(1, (0.1, 0.2, 0.6, 0.9), "ring")
    answers = (BoxesAnswer((box, box)), ChoiceAnswer("A", ("left", "right")))
    with ShardWriter(folder) as writer:
        for number in range(reader.count):
            loaded = reader.read(number)
            if number < num_unusable:
                loaded = replace(loaded, sample=replace(loaded.sample, answer=answers[number % 2]))
            writer.add(loaded)
    return f"--data.shards={folder}"


@pytest.mark.parametrize("phase", ["cot_sft", "grpo"])
def test_samples_without_one_box_are_counted_by_name_and_left_out(workbench: Workbench, caplog, phase: str) -> None:
    assert run(workbench.training(phase), with_answers(workbench, 5), "--trainer.max_steps=6") is None
    assert "5 samples rejected: no_box_answer 5 (" in caplog.text
    assert read_json(workbench.outputs / "tiny" / phase / "done.json")


@pytest.mark.parametrize("phase", ["cot_sft", "grpo"])
def test_data_without_any_usable_sample_ends_the_run_in_one_line(workbench: Workbench, phase: str) -> None:
    reason = run(workbench.training(phase), with_answers(workbench, 12))
    assert reason.startswith("no usable sample in a whole epoch: 12 samples rejected: no_box_answer 12 (")
    assert "data.batch_size=13 on 1 rank needs 13 samples" in run(workbench.training(phase), "--data.batch_size=13")
