"""Settings that follow from others, and null as the value of a flag."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Checkpoint

from callbacks.save_on_interrupt import SaveOnInterrupt
from callbacks.throughput import Throughput
from experiments.runs.command_line import train_cli
from experiments.runs.command_line.null_settings import null_problems
from experiments.runs.command_line.setting_names import LINKED, refuse_unknown
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.grpo import GRPO

NANO = Path(__file__).resolve().parents[4] / "experiments/configs/nano"


class Parsed(train_cli.TrainCLI):
    """The CLI without instantiation, and without the folder and the checks of a run."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


class Made(train_cli.TrainCLI):
    """The CLI with all its objects, and without the folder and the checks of a run."""

    key = "none"

    def before_instantiate_classes(self) -> None:
        pass


def parse(name: str, *flags: str) -> Parsed:
    return Parsed(["--config", str(NANO / f"{name}.yaml"), *flags])


@pytest.fixture(autouse=True)
def one_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])  # LightningCLI warns when it is given arguments in two ways


def test_each_link_of_the_parser_is_in_the_table_of_refused_settings() -> None:
    parser = parse("grpo").parser
    links = {action.target[0]: action.source[0][0] for action in parser._links_group._group_actions}
    assert {target.replace("init_args.", ""): source.replace("init_args.", "") for target, source in links.items()} == (
        LINKED
    )


@pytest.mark.parametrize("name", ["cot_sft", "grpo"])
def test_the_config_of_a_run_can_be_given_again(name: str, tmp_path: Path) -> None:
    """It has none of the settings that follow from others. A copy, so that the settings are checked."""
    cli = parse(name, "--seed_everything=7")
    config = tmp_path / "copy.yaml"
    config.write_text(cli.parser.dump(cli.config, skip_unset=False))  # as in before_instantiate_classes
    refuse_unknown(["--config", str(config)])
    again = Parsed(["--config", str(config)])
    assert again.settings() == cli.settings() and again.settings()["model"]["init_args"]["seed"] == 7


CLIP = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}


@pytest.mark.parametrize(
    ("flags", "group", "expected"),
    [
        (["--model.rollout.log=null"], "rollout", {"log": None, "temperature": 0.6}),
        (["--model.rollout.log", "null"], "rollout", {"log": None}),
        (["--model.rollout.log=a.jsonl", "--model.rollout.log=~"], "rollout", {"log": None}),
        (["--model.rollout.log=null", "--model.rollout.log=a.jsonl"], "rollout", {"log": "a.jsonl"}),
        (["--model.init_args.rollout.log=null"], "rollout", {"log": None}),
        (["--model.rollout.kv_cache_gib=3", "--model.rollout.kv_cache_gib=null"], "rollout", {"kv_cache_gib": None}),
        (["--model.loss.clip_high=null"], "loss", CLIP | {"clip_high": None, "kl_beta": 0.02}),
        (
            ["--model.loss.clip_high=null", "--model.loss.clip_low=null"],
            "loss",
            CLIP | {"clip_high": None, "clip_low": None},
        ),
        (
            ["--model.loss.kl_beta=0.5", "--model.loss.clip_high=null", "--model.loss.dual_clip=3"],
            "loss",
            CLIP | {"clip_high": None, "dual_clip": 3.0, "kl_beta": 0.5},
        ),
        (["--model.update.max_idle_windows=null"], "update", {"max_idle_windows": None, "minibatches": 1}),
    ],
)
def test_null_is_null_inside_a_group(flags: list[str], group: str, expected: dict) -> None:
    settings = parse("grpo", *flags).settings()["model"]["init_args"][group]
    assert {name: settings[name] for name in expected} == expected


def test_null_is_null_in_a_group_of_a_group() -> None:
    servers = ["adapters=a", "patience=7", "adapters=null", "basic_auth_env=null", "model=m"]
    flags = [f"--model.rollout.vllm.{word}" for word in servers]
    loss = ["--model.loss.kl_schedule.kind=linear", "--model.loss.kl_schedule.updates=null"]
    settings = parse("grpo", *flags, *loss).settings()["model"]["init_args"]
    found = settings["rollout"]["vllm"]
    names = ("adapters", "patience", "basic_auth_env", "model")
    assert [found[name] for name in names] == [None, 7.0, None, "m"]
    assert settings["loss"]["kl_schedule"] == {"kind": "linear", "final": 0.0, "updates": None}
    assert settings["rollout"]["log"] == "rollouts.jsonl"


def test_null_is_null_in_a_mapping_and_other_texts_stay() -> None:
    flags = ['--model.rollout.vllm={"adapters": null, "patience": 9}', "--model.rollout.log=None of [these"]
    rollout = parse("grpo", "--model.rollout.vllm.adapters=a", *flags).settings()["model"]["init_args"]["rollout"]
    assert (rollout["vllm"]["adapters"], rollout["vllm"]["patience"]) == (None, 9.0)
    assert rollout["log"] == "None of [these"


def test_null_for_a_setting_that_needs_a_value_is_named() -> None:
    flags = ["--model.accumulate=null", "--model.max_grad_norm=null", "--model.rewards=null"]
    groups = ['--model.loss={"kl_beta": null, "clip_low": null}', '--model.rollout={"vllm": {"patience": null}}']
    model = parse("grpo", *flags, *groups).config.model
    named = {"model.accumulate", "model.loss.kl_beta", "model.rollout.vllm.patience"}
    assert {problem.partition("=null: ")[0] for problem in null_problems("model", GRPO, model)} == named
    lora = parse("cot_sft", "--model.lora.rank=null", "--model.feature_cache=null").config.model
    assert null_problems("model", CoTSFT, lora) == ["model.lora.rank=null: this setting needs a value"]


@pytest.mark.parametrize(
    "file", sorted(NANO.parent.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_no_shipped_configuration_has_a_null_that_is_refused(file: Path) -> None:
    if "\nphase:" not in file.read_text():
        return
    cli = Parsed(["--config", str(file)])
    assert [problem for part in cli._parts() for problem in null_problems(*part)] == []


def test_the_callback_that_ends_an_interrupted_run_is_the_last(monkeypatch) -> None:
    """A callback behind it would miss the last batch: an evaluation that is due then would never be made."""
    late = "--trainer.callbacks+=callbacks.throughput.Throughput"
    cli = Made(["--config", str(NANO / "grpo.yaml"), late, "--trainer.logger=false", "--trainer.devices=1"])
    kinds = [type(callback) for callback in cli.trainer.callbacks if not isinstance(callback, Checkpoint)]
    assert kinds[-1] is SaveOnInterrupt and kinds[-2] is Throughput
