from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from datamodules.persistence.files import read_json
from experiments import generate_synthetic
from tests.outside_make import outside_make

SETTINGS = {"seed": 0, "train_samples": 3, "eval_per_task": 1, "pool_samples": 2}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """train_samples of every dataset that is built; the build itself only marks its folder."""
    counts: list[int] = []

    def build_nano(root: str, train_samples: int, **_: int) -> None:
        counts.append(train_samples)
        (Path(root) / "MIG-Bench").mkdir(parents=True)

    monkeypatch.setattr("datamodules.synthetic.write_samples.build_nano", build_nano)
    return counts


def test_a_dataset_of_the_same_settings_is_built_once_and_another_moves_it_aside(tmp_path: Path, built: list) -> None:
    root = tmp_path / "nano"
    generate_synthetic.build(str(root), **SETTINGS)
    generate_synthetic.build(str(root), **SETTINGS)
    assert built == [3]
    key = read_json(root / "done.json")["key"]
    generate_synthetic.build(str(root), **SETTINGS | {"train_samples": 9})
    assert built == [3, 9]
    assert read_json(tmp_path / f"nano.{key[:8]}" / "done.json")["key"] == key


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("mig_bench", ["MIG-Bench: 10", "validation: 10", "sft: 2", "rl_pool: 2"]),
        ("multi_box", ["in_domain: 3", "out_of_domain: 2", "sft: 2", "rl_pool: 2"]),
    ],
)
def test_each_part_of_a_dataset_shows_its_progress(tmp_path: Path, capsys, kind: str, parts: list[str]) -> None:
    """In a log file, no part is silent, not even the questions for evaluation, which take longest to begin."""
    settings = {"seed": 0, "train_samples": 2, "eval_per_task": 1, "pool_samples": 2, "validation_per_task": 1}
    generate_synthetic.build(str(tmp_path / "data"), **settings, kind=kind)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"generating the synthetic dataset: {tmp_path / 'data'}"
    assert [line.split(" of ")[0] for line in lines if " of " in line] == parts


def test_training_keeps_a_finished_dataset_of_other_settings(tmp_path: Path, built: list, capsys) -> None:
    root = tmp_path / "nano"
    generate_synthetic.build(str(root), **SETTINGS | {"train_samples": 9})
    generate_synthetic.build(str(root), **SETTINGS, keep=True)
    assert built == [9] and "other settings" in capsys.readouterr().out
    (root / "done.json").unlink()
    (root / "MIG-Bench").rmdir()
    generate_synthetic.build(str(root), **SETTINGS, keep=True)
    assert built == [9, 3], "an unfinished one is not kept"


@pytest.mark.parametrize("name", ["MIG-Bench", "shards", "validation"])
def test_folders_that_were_not_made_here_are_never_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "images.zip").write_text("a download of 1 GB")
    with pytest.raises(SystemExit, match=name):
        generate_synthetic.build(str(tmp_path), **SETTINGS)
    assert (tmp_path / name / "images.zip").is_file()
    assert not (tmp_path / "started.json").exists()


def test_make_shards_runs_this_command() -> None:
    command = ["make", "-n", "shards", "STAMP=Makefile"]
    root = Path(generate_synthetic.__file__).parents[1]
    printed = subprocess.run(command, cwd=root, env=outside_make(), capture_output=True, text=True, check=True).stdout
    assert f"-m {generate_synthetic.__name__} --config experiments/configs/nano/shards.yaml" in printed


def test_a_pipeline_may_have_several_datasets_and_the_absent_ones_are_known(tmp_path: Path) -> None:
    configs = []
    for name in ("small", "large"):
        (tmp_path / f"{name}.yaml").write_text(f"root: {tmp_path / name}\n")
        configs.append(str(tmp_path / f"{name}.yaml"))
    assert generate_synthetic.dataset_configs(None) == []
    assert generate_synthetic.dataset_configs(configs[0]) == configs[:1]
    assert generate_synthetic.absent_data(configs) == [str(tmp_path / "small"), str(tmp_path / "large")]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "done.json").write_text("{}")
    assert generate_synthetic.absent_data(generate_synthetic.dataset_configs(configs)) == [str(tmp_path / "large")]
