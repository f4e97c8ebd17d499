"""Wrong names are found from the source files alone, and no name that exists is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.runs.command_line.setting_names import DATA, TRAINER, _dotted, class_names, refuse_unknown
from experiments.runs.parsers import class_settings

ROOT = Path(__file__).resolve().parents[4]
CONFIGS = sorted((ROOT / "experiments/configs").glob("*/*.yaml"))


def class_paths(settings: object) -> set[str]:
    """All class paths in a configuration."""
    if isinstance(settings, dict):
        own = {settings["class_path"]} if isinstance(settings.get("class_path"), str) else set()
        return own.union(*(class_paths(value) for value in settings.values()))
    return set().union(*(class_paths(value) for value in settings)) if isinstance(settings, list) else set()


PATHS = {DATA, TRAINER}.union(*(class_paths(yaml.safe_load(file.read_text())) for file in CONFIGS))


@pytest.mark.parametrize("path", sorted(PATHS))
def test_all_settings_that_the_parser_takes_are_known(path: str) -> None:
    names = class_names(path)
    assert names is None or set(class_settings(path)) <= set(_dotted(names))


def test_the_settings_of_a_run_are_known() -> None:
    """Else their misspelt names would be left to the parser, which takes seconds."""
    paths = {DATA, TRAINER, "lightning_modules.grpo.GRPO", "lightning_modules.cot_sft.CoTSFT"}
    assert all(class_names(path) for path in paths)
    assert "loss.kl_beta" in _dotted(class_names("lightning_modules.grpo.GRPO"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_shipped_training_configuration_is_refused(file: Path) -> None:
    if file.parent.name == "objectives":  # a fragment for a second --config
        refuse_unknown(["--config", str(ROOT / "experiments/configs/nano/grpo.yaml"), f"--config={file}"])
    elif "phase" in (yaml.safe_load(file.read_text()) or {}):
        refuse_unknown(["--config", str(file)])


@pytest.mark.parametrize(
    "words",
    [
        ["--print_config"],
        ["--help"],
        ["--model.help=lightning_modules.grpo.GRPO"],
        ["--model=my.own.Module", "--model.anything=1"],
        ["--trainer.callbacks+=callbacks.throughput.Throughput"],
        ["--trainer.logger=false", "--data.shards=--odd"],
        ["--model.init_args.lora=null", "--model.lora.rank=3"],
    ],
)
def test_what_only_the_parser_can_judge_is_left_to_it(words: list[str]) -> None:
    refuse_unknown(["--config", str(ROOT / "experiments/configs/nano/grpo.yaml"), *words])


FOLLOWS = r"this setting always has the value of {0}\. Give {0} instead"


@pytest.mark.parametrize(
    ("words", "shown", "source"),
    [
        (["--model.seed=5"], "--model.seed=5", "seed_everything"),
        (["--model.init_args.seed", "5"], "--model.seed=5", "seed_everything"),
        (["--data.seed=5"], "--data.seed=5", "seed_everything"),
        (["--model.box_format=normalized"], "--model.box_format=normalized", "data.box_format"),
        (["--data.processor=models/other"], "--data.processor=models/other", "model.model"),
        (['--model.init_args={"seed": 5}'], "--model.init_args: model.seed=5", "seed_everything"),
        (["--model", '{"init_args": {"seed": 5}}'], "--model: model.seed=5", "seed_everything"),
        (['--data={"seed": 5}'], "--data: data.seed=5", "seed_everything"),
        (["--model.class_path=my.own.Module", "--model.seed=5"], "--model.seed=5", "seed_everything"),
    ],
)
def test_a_flag_that_another_setting_would_overwrite_is_refused(words: list[str], shown: str, source: str) -> None:
    message = f"^{re.escape(shown)}: {FOLLOWS.format(source)}$"
    with pytest.raises(SystemExit, match=message):
        refuse_unknown(["--config", str(ROOT / "experiments/configs/nano/grpo.yaml"), *words])


@pytest.mark.parametrize(
    ("text", "line", "source"),
    [
        ("model:\n  init_args:\n    seed: 5\n", 3, "seed_everything"),
        ("model:\n  seed: 5\n", 2, "seed_everything"),
        ("model: {class_path: my.own.Module, init_args: {seed: 5}}\n", 1, "seed_everything"),
        ("model: {init_args: {box_format: normalized}}\n", 1, "data.box_format"),
        ("data: {seed: 5}\n", 1, "seed_everything"),
    ],
)
@pytest.mark.parametrize("phase", ["grpo", "cot_sft"])
def test_a_setting_of_a_yaml_that_another_one_would_overwrite_is_refused(
    tmp_path: Path, text: str, line: int, source: str, phase: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    message = rf"^{tmp_path}/mine\.yaml, line {line}: (model|data)\.\w+=\w+: {FOLLOWS.format(source)}$"
    with pytest.raises(SystemExit, match=message):
        refuse_unknown([f"--config={ROOT}/experiments/configs/nano/{phase}.yaml", f"--config={tmp_path}/mine.yaml"])


def test_a_yaml_of_the_data_alone_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("batch_size: 3\nseed: 5\n")
    with pytest.raises(SystemExit, match=r"data\.yaml, line 2: data\.seed=5: "):
        refuse_unknown([f"--config={ROOT}/experiments/configs/nano/grpo.yaml", f"--data={tmp_path}/data.yaml"])


def test_no_message_suggests_a_setting_that_would_be_refused() -> None:
    with pytest.raises(SystemExit) as end:
        refuse_unknown(["--config", str(ROOT / "experiments/configs/nano/grpo.yaml"), "--model.seeed=5"])
    assert "--model.seeed=5: no such setting" in str(end.value) and "model.seed?" not in str(end.value)


def test_a_class_that_passes_its_arguments_elsewhere_is_not_known(tmp_path: Path, monkeypatch) -> None:
    source = (
        "class Base:\n    def __init__(self, a: int = 1): ...\n"
        "class Passes(Base):\n    def __init__(self, b: int = 2, **more):\n        super().__init__(**more)\n"
        "class Elsewhere(Base):\n    def __init__(self, **more):\n        super().__init__(**more)\n        f(**more)\n"
        "class Any(Base):\n    def __init__(self, *values): ...\n"
    )
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/made_up.py").write_text(source)
    monkeypatch.setattr("experiments.runs.command_line.setting_names.ROOT", tmp_path)
    assert list(class_names("callbacks.made_up.Passes")) == ["a", "b"]
    assert class_names("callbacks.made_up.Elsewhere") is class_names("callbacks.made_up.Any") is None
    assert class_names("callbacks.made_up.Absent") is class_names("outside.made_up.Base") is None


def test_a_typo_is_told_before_torch_and_lightning_are_imported() -> None:
    code = (
        "import sys\nfrom experiments import train\n"
        "try:\n    train.main(['--config', 'experiments/configs/nano/grpo.yaml', '--model.loss.kl_bta=1'])\n"
        "except SystemExit as end:\n    print(end)\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    told, loaded = ended.stdout.splitlines()
    assert told == "--model.loss.kl_bta=1: no such setting; did you mean model.loss.kl_beta?" and loaded == "[]"
