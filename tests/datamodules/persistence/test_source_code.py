from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.persistence.source_code import ROOT, changed_files, class_modules, source_code

FILES = {
    "experiments/__init__.py": "",
    "experiments/train.py": "import torch\nfrom callbacks import merge\ndef run():\n from datamodules.late import f\n",
    "callbacks/__init__.py": "",
    "callbacks/merge.py": '"""Text."""\nX = 1\n',
    "callbacks/named.py": "import datamodules.samples.boxes as b\n",
    "callbacks/unused.py": "Y = 1\n",
    "datamodules/__init__.py": "",
    "datamodules/samples/boxes.py": "class A:\n    def f(self):\n        return 1\n",
    "datamodules/late.py": "def f():\n    return 2\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def changed_by(project: Path, name: str, text: str) -> list[str]:
    modules = ("experiments.train", "callbacks.named")
    before = source_code(modules, project)
    (project / name).write_text(text)
    return changed_files(before, source_code(modules, project))


def test_all_that_is_imported_counts_at_once_late_or_by_a_configuration(project: Path) -> None:
    found = source_code(("experiments.train",), project)
    assert sorted(found) == [name for name in sorted(FILES) if not name.endswith(("named.py", "unused.py", "boxes.py"))]
    settings = {"trainer": {"callbacks": [{"class_path": "callbacks.named.Named", "init_args": {}}]}}
    found = source_code(("experiments.train", *class_modules(settings)), project)
    assert {"callbacks/named.py", "datamodules/samples/boxes.py"} < set(found) and "callbacks/unused.py" not in found


def test_a_class_that_a_file_names_by_its_path_counts(project: Path) -> None:
    text = 'FIELDS = {"class_path": str}\nDEFAULT = [{"class_path": "callbacks.named.Named", **FIELDS}, {1: 2}]\n'
    found = changed_by(project, "callbacks/merge.py", text)
    assert found == ["callbacks/merge.py"], "callbacks.named is counted by its configuration already"
    found = source_code(("callbacks.merge",), project)
    assert {"callbacks/named.py", "datamodules/samples/boxes.py"} < set(found)


@pytest.mark.parametrize(
    ("name", "text", "counts"),
    [
        ("datamodules/samples/boxes.py", "class A:\n    def f(self):\n        return 2\n", True),
        ("datamodules/late.py", "def f():\n    return 3\n", True),
        ("datamodules/samples/boxes.py", "class A:  # w\n    'W'\n    def f(self):\n        return 1\n", False),
        ("callbacks/merge.py", '"""Another text."""\n\n\nX = 1  # one\n', False),
        ("callbacks/unused.py", "Y = 2\n", False),
        ("callbacks/merge.py", "X = '1'\n", True),
        ("callbacks/merge.py", "X = (\n", True),
    ],
)  # fmt: skip
def test_code_counts_and_comments_do_not(project: Path, name: str, text: str, counts: bool) -> None:
    assert changed_by(project, name, text) == [name] * counts


def test_files_that_come_and_go_are_named(project: Path) -> None:
    found = changed_by(project, "callbacks/merge.py", "import callbacks.unused\nX = 1\n")
    assert found == ["callbacks/merge.py", "callbacks/unused.py (new)"]
    found = changed_by(project, "experiments/train.py", "import torch\n")
    assert "callbacks/merge.py (no longer used)" in found and "datamodules/late.py (no longer used)" in found


def test_the_project_s_own_commands_are_read() -> None:
    found = source_code(("experiments.train", "lightning_modules.grpo"))
    assert {
        "lightning_modules/rl/rewards/reward_list.py",
        "lightning_modules/rl/rewards/box_rewards.py",
        "lightning_modules/rl/rewards/text_rewards.py",
        "datamodules/samples/answer_text.py",
        "experiments/runs/run_key.py",
    } < set(found)
    assert all((ROOT / name).is_file() for name in found) and "experiments/ablations.py" not in found
