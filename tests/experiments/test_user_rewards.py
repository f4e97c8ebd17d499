"""Rewards in a user's own file: trained with, logged by name, part of the run's identity, and told when they fail."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from datamodules.persistence.files import read_json
from datamodules.persistence.source_code import changed_files
from experiments import pipeline, train
from experiments.pipeline import Phase
from experiments.runs import metrics_csv
from experiments.runs.run_key import run_key
from lightning_modules.rl.rollout_log import read_index
from tests.experiments.conftest import Workbench

ROOT = Path(__file__).resolve().parents[2]
FIVE = Path(__file__).with_name("five_rewards.py")
LIST = [
    {"class_path": "lightning_modules.rl.rewards.box_rewards.IoU", "name": "accuracy"},
    {"class_path": "my_rewards.short", "weight": 1.0},
    {"class_path": "my_rewards.mentions", "init_args": {"least": 2}, "weight": 0.5},
    {"class_path": "my_rewards.CentreInside", "name": "centre"},
    {"class_path": "my_rewards.Vowels", "init_args": {"wanted": 0.4}, "weight": 2.0},
    {"class_path": "my_rewards.Rare", "weight": 0.0},
]
NAMES = ("accuracy", "short", "mentions", "centre", "vowels", "rare")


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch):
    """Each test imports its own my_rewards.py."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)


def configure(workbench: Workbench, rewards: list[dict] = LIST, **settings) -> str:
    """A configuration with these rewards, and the five of `five_rewards.py` beside it."""
    shutil.copy(FIVE, workbench.root / "my_rewards.py")
    return workbench.training("grpo", rewards=rewards, log="rollouts.jsonl", **settings)


def test_each_of_the_five_is_short_and_outside_of_the_packages() -> None:
    bodies = [node for node in ast.parse(FIVE.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(bodies) == 5 and all(node.end_lineno - node.lineno < 20 for node in bodies)


def test_a_run_trains_with_five_rewards_of_a_user_and_logs_each_by_name(workbench: Workbench) -> None:
    train.main(["--config", configure(workbench), "--trainer.max_steps=3", "--model.reward_weights.short=0.25"])
    folder = workbench.outputs / "tiny" / "grpo"
    rows = metrics_csv.read_rows(folder)
    for name in NAMES:
        for part in ("", "/std", "/zero"):
            assert len(metrics_csv.read_curve(rows, f"reward/{name}{part}")) == 3, name
    assert {name.count("/failed") for row in rows for name in row} == {0}
    weights = {"accuracy": 1.0, "short": 0.25, "mentions": 0.5, "centre": 1.0, "vowels": 2.0, "rare": 0.0}
    groups = [group.read() for group in read_index(folder / "rollouts.jsonl")]
    spread = set()
    for reward in (reward for group in groups for reward in group["rewards"]):
        assert set(reward) == {"total", "failure", *NAMES}
        assert reward["total"] == pytest.approx(sum(weights[name] * reward[name] for name in NAMES))
        spread.add(reward["total"])
    assert len(spread) > 3
    assert read_json(folder / "started.json")["code"]["my_rewards.py"]


def test_a_changed_file_is_another_run_and_a_comment_is_not(workbench: Workbench, capsys) -> None:
    arguments = ["--config", configure(workbench), "--trainer.logger=false", "--trainer.max_steps=1"]
    train.main(arguments)
    file = workbench.root / "my_rewards.py"
    file.write_text(file.read_text() + "\n# A note.\n")
    train.main(arguments)
    assert "already done" in capsys.readouterr().out
    file.write_text(file.read_text().replace("return 1 - completion", "return 2 - completion"))
    train.main(arguments)
    said = capsys.readouterr().out
    assert re.search(r"model\.rewards: my_rewards\.py \(\w{8}\) -> my_rewards\.py \(\w{8}\)", said)
    assert len(list((workbench.outputs / "tiny").glob("grpo.*"))) == 1, "the old run is kept aside"


def test_the_key_holds_what_a_users_file_imports(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(workbench.root)
    (workbench.root / "my_words.py").write_text("WORDS = ['cup']\n")
    (workbench.root / "my_rewards.py").write_text("import json\nimport torch\nfrom my_words import WORDS\n")
    settings = yaml.safe_load(
        Path(workbench.training("grpo", rewards=[{"class_path": "my_rewards.short"}])).read_text()
    )
    keys = [run_key(settings)]
    importlib.invalidate_caches()
    for text in ("WORDS = ['mug']\n", "WORDS = ['cup']\n"):
        (workbench.root / "my_words.py").write_text(text)
        keys.append(run_key(settings))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_path": "my_rewards.shrt"}, "my_rewards has no shrt; did you mean short?"),
        ({"class_path": "your_rewards.short"}, "there is no module your_rewards; put your_rewards.py beside the YAML"),
        ({"class_path": "my_rewards.Vowels"}, "missing a required argument: 'wanted'"),
        (
            {"class_path": "my_rewards.short", "wieght": 2.0},
            "wieght=2.0: there is no such field; did you mean weight?",
        ),
        ({"class_path": "my_rewards.short", "weight": "much"}, "rewards[0].weight='much' must be a number"),
        (
            {"class_path": "lightning_modules.rl.rewards.text_rewards.SoftOverlong", "init_args": {"margin": 400}},
            "margin=400 must be at most the limit, which is rollout.max_new_tokens=6",
        ),
        ({"class_path": "my_rewards.short", "weight": 0.0}, "every reward would be 0"),
    ],
)
def test_a_list_that_cannot_work_ends_in_a_short_message(workbench: Workbench, change: dict, words: str) -> None:
    config = configure(workbench, [change])
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", config])
    assert words in str(caught.value.code) and len(str(caught.value.code).splitlines()) <= 5
    assert not (workbench.outputs / "tiny").exists() or not list((workbench.outputs / "tiny").glob("grpo*"))


FAULTY = """
class NoFile:
    def __init__(self):
        open("no_such_words.txt")

    def __call__(self, completion):
        return 0.0


class OneNumber(NoFile):
    def __init__(self):
        self.range = 1.0
"""


def test_constructors_with_a_fault_end_in_a_short_message_with_each_entry(workbench: Workbench) -> None:
    config = configure(workbench, [{"class_path": "my_rewards.NoFile"}, {"class_path": "my_rewards.OneNumber"}])
    (workbench.root / "my_rewards.py").write_text(FAULTY)
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", config, "--trainer.logger=false"])
    said = str(caught.value.code)
    assert "rewards[0].class_path='my_rewards.NoFile': its constructor raised FileNotFoundError: [Errno 2]" in said
    assert "rewards[1].class_path='my_rewards.OneNumber': range=1.0 must be two numbers, the lower one first" in said
    assert len(said.splitlines()) <= 5


def test_a_reward_for_one_box_is_refused_with_named_images_before_anything_is_loaded(workbench: Workbench) -> None:
    config = configure(workbench, [{"class_path": "lightning_modules.rl.rewards.box_rewards.CIoU"}])
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", config, "--trainer.logger=false", "--data.answer_form=named_image"])
    said = str(caught.value.code)
    assert "these settings cannot be run" in said and "reward 'ciou'" in said and "data.answer_form=named_image" in said


def test_a_reward_that_raises_ends_the_run_in_a_few_lines(workbench: Workbench) -> None:
    config = configure(workbench, [{"class_path": "my_rewards.broken"}])
    (workbench.root / "my_rewards.py").write_text("def broken(completion):\n    return 1 / 0\n")
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", config, "--trainer.logger=false"])
    said = str(caught.value.code)
    assert (
        "reward 'broken' (my_rewards.broken) raised ZeroDivisionError: division by zero at my_rewards.py, line 2"
        in said
    )
    assert "sample 'tiny/" in said and len(said.splitlines()) <= 5


def test_two_ranks_find_the_file_beside_the_yaml(workbench: Workbench) -> None:
    command = [sys.executable, "-m", "experiments.train", "--config", configure(workbench), "--trainer.devices=2"]
    command += ["--trainer.strategy=ddp", "--trainer.max_steps=1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    folder = workbench.outputs / "tiny" / "grpo"
    assert metrics_csv.read_curve(metrics_csv.read_rows(folder), "reward/short")
    logs = sorted(folder.glob("rollouts-rank*.jsonl"))
    assert len(logs) == 2 and all("vowels" in json.loads(log.read_text().splitlines()[0])["rewards"][0] for log in logs)


def test_a_pipeline_notices_a_changed_file_too(workbench: Workbench) -> None:
    config, evaluation = (
        configure(workbench),
        workbench.write_yaml("eval", dict.fromkeys(("model", "output", "data_root"), "unused")),
    )
    made = pipeline.Pipeline(
        workbench.outputs, 0, str(workbench.model), evaluation, {"grpo": Phase("base", config)}, {}
    )
    before = made.training("grpo").code()
    file = workbench.root / "my_rewards.py"
    file.write_text(file.read_text().replace("return 1 - completion", "return 2 - completion"))
    assert changed_files(before, made.training("grpo").code()) == ["my_rewards.py"]
