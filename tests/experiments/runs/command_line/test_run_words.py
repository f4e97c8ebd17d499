"""A seed, a number of GPUs and the model of an earlier phase become settings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from datamodules.multi_image import MultiImageData
from experiments.runs.command_line.run_words import WordsError, complete_words, take_number

NANO = Path(__file__).resolve().parents[4] / "experiments/configs/nano"


def write(folder: Path, **settings: object) -> str:
    """A YAML of experiment "nano"; its path."""
    file = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump({"experiment": "nano", **settings}))
    return str(file)


def added(*words: str) -> list[str]:
    """What is added to a command line."""
    completed = complete_words(list(words))
    kept = [word for word in words if not word.startswith(("--seed=", "--gpus="))]
    assert completed[: len(kept)] == kept
    return completed[len(kept) :]


def test_a_seed_names_the_folder_as_the_pipeline_does(tmp_path: Path) -> None:
    config = write(tmp_path)
    assert added("--config", config, "--seed=1") == ["--seed_everything=1", "--experiment=nano-seed1"]
    assert added("--config", config, "--seed=0") == ["--seed_everything=0", "--experiment=nano"]
    mine = added("--experiment", "mine", f"--config={config}", "--seed=2")
    assert mine == ["--seed_everything=2", "--experiment=mine-seed2"]
    assert added("--config", config) == added("--config", config, "--seed_everything=3") == []


@pytest.mark.parametrize("words", [["--seed"], ["--seed", "abc"], ["--seed=-1"], ["--gpus=0"], ["--gpus=1.5"]])
def test_a_value_that_is_no_number_is_refused(words: list[str]) -> None:
    with pytest.raises(WordsError, match="must be a whole number"):
        complete_words(words)


def test_the_last_number_counts() -> None:
    assert take_number(["a", "--seed", "1", "--seed=2", "b"], "--seed", least=0) == (["a", "b"], 2)


def test_a_run_of_another_experiment_starts_from_the_model_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path, phase="grpo", model={"init_args": {"model": "outputs/nano/cot_sft/merged"}})
    for folder in ("outputs/mine", "outputs/nano-seed1", "elsewhere/nano"):
        (tmp_path / folder / "cot_sft/merged").mkdir(parents=True)
    assert added("--config", config) == [], "the YAML's own experiment"
    linked = "--model.init_args.model=outputs/mine/cot_sft/merged"
    assert added("--config", config, "--experiment=mine") == [linked]
    assert added("--config", config, "--seed=1")[-1] == "--model.init_args.model=outputs/nano-seed1/cot_sft/merged"
    assert added("--config", config, "--outputs", "elsewhere") == [
        "--model.init_args.model=elsewhere/nano/cot_sft/merged"
    ]
    for flag in ("--model.model=x", "--model.init_args.model=x"):
        assert added("--config", config, "--experiment=mine", flag) == [], "the user has named a model"
    for model in ("models/nano-base", "outputs/other/cot_sft/merged", "outputs/nano/cot_sft"):
        elsewhere = write(tmp_path, model={"init_args": {"model": model}})
        assert added("--config", elsewhere, "--experiment=mine") == [], "no model of the YAML's experiment"


def total(words: list[str], devices: int) -> int:
    values = dict(word.removeprefix("--").split("=") for word in words)
    batch, accumulate = values["data.batch_size"], values["model.init_args.accumulate"]
    assert int(values["trainer.devices"]) == devices and values["trainer.accelerator"] == "gpu"
    return int(batch) * devices * int(accumulate)


@pytest.mark.parametrize(("config", "samples"), [("nano/grpo", 64), ("paper/cot_sft_7b", 32), ("paper/grpo_7b", 8)])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_total_batch_stays(config: str, samples: int, gpus: int, capsys) -> None:
    words = added("--config", str(NANO.parent / f"{config}.yaml"), f"--gpus={gpus}")
    assert total(words, gpus) == samples
    assert ("--trainer.strategy=ddp" in words) is (gpus > 1 and "paper" in config)
    assert capsys.readouterr().out.endswith(f"= {samples}, the total batch\n")


def test_flags_count_for_the_total_batch_and_a_strategy_stays() -> None:
    flags = ["--data.batch_size=3", "--model.accumulate=4", "--trainer.strategy=sharded"]
    words = added("--config", str(NANO.parent / "paper/grpo_7b.yaml"), *flags, "--gpus=6")
    assert total(words, 6) == 12 and "--trainer.strategy=ddp" not in words


def test_the_total_batch_stays_without_a_number_in_the_yaml_and_with_a_yaml_behind_a_flag(tmp_path: Path) -> None:
    plain = write(tmp_path, data={"shards": "x"})
    assert (
        total(added("--config", plain, "--gpus=2"), 2)
        == inspect.signature(MultiImageData).parameters["batch_size"].default
    )
    more = write(tmp_path, data={"batch_size": 16})
    for words in (["--data.batch_size=4", "--config", more], ["--data.batch_size", "4", f"--config={more}"]):
        assert total(added("--config", plain, *words, "--gpus=2"), 2) == 16
        assert total(added("--config", plain, *words, "--data.batch_size=32", "--gpus=2"), 2) == 32
    assert total(added("--config", more, "--data.batch_size=4", "--config", plain, "--gpus=2"), 2) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus=3"], "total batch of 64 samples .* Use 1, 2, 4, 8, 16, 32, 64 GPUs"),
        (["--gpus=2", "--trainer.devices=2"], "exclude each other"),
        (["--gpus=2", "--data.batch_size=many"], "is not known from data.batch_size=many"),
        (["--gpus=2", "--data.batch_size=0"], "is not known from data.batch_size=0.* Give numbers above 0"),
    ],
)
def test_a_number_of_gpus_that_changes_the_total_batch_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(WordsError, match=message):
        complete_words(["--config", str(NANO / "grpo.yaml"), *flags])


def test_files_that_the_parser_refuses_are_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: {")
    (tmp_path / "list.yaml").write_text("- 1")
    for words in (
        [],
        ["--config"],
        ["--config", "nope.yaml"],
        [f"--config={tmp_path}/bad.yaml"],
        [f"--config={tmp_path}/list.yaml"],
    ):
        assert complete_words(words) == words
