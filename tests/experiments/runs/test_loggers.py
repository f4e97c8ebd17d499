from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from experiments import evaluate, train
from experiments.runs import metrics_csv, wandb_runs
from experiments.runs.loggers import LoggerMissing, MetricsLogger, OnceWandbLogger, make_loggers
from experiments.runs.run_key import run_key
from tests.conftest import SmallDisk
from tests.experiments.conftest import Workbench

OFF = [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}, {"WANDB_DISABLED": "1", "WANDB_MODE": "online"}]


def test_a_batch_that_is_logged_twice_is_one_row(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 0)
    for step in (0, 0, 1):
        logger.log_metrics({"loss": 2.0, "epoch": 0}, step)
    logger.log_metrics({"mig_bench_val/avg": 30.0}, 1)
    logger.finalize("success")
    assert len(logger.file.read_text().splitlines()) == 3
    rows = metrics_csv.read_rows(tmp_path)
    assert [row["step"] for row in rows] == ["0", "1"]
    assert rows[1] == {"step": "1", "loss": "2.0", "epoch": "0", "mig_bench_val/avg": "30.0"}


def test_rows_wait_in_memory_while_the_disk_is_full(small_disk: SmallDisk, caplog) -> None:
    folder = small_disk.root / "phase"
    folder.mkdir()
    logger = MetricsLogger(folder, 0)
    logger.log_metrics({"loss": 0.0}, 0)
    small_disk.fill()
    with caplog.at_level(logging.WARNING, "experiments.runs.loggers"):
        for step in range(1, 400):  # more than what is left in the file's last block
            logger.log_metrics({"loss": 0.0}, step)
    assert [record.message.count("MiB free") for record in caplog.records] == [1]
    held = [int(row["step"]) for row in metrics_csv.read_rows(folder)]
    assert held == list(range(len(held))) and len(held) < 400
    assert logger.file.read_text().endswith("\n"), "no cut row"
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        logger.finalize("success")
    small_disk.make_room()
    logger.log_metrics({"loss": 0.0}, 400)
    assert [int(row["step"]) for row in metrics_csv.read_rows(folder)] == list(range(401))


def test_nothing_is_written_where_the_filesystem_was(small_disk: SmallDisk) -> None:
    folder = small_disk.root / "phase"
    folder.mkdir()
    logger = MetricsLogger(folder, 0)
    logger.log_metrics({"loss": 0.0}, 0)
    small_disk.lose()
    logger.log_metrics({"loss": 0.0}, 1)
    assert list(small_disk.root.iterdir()) == []


def kinds(folder: Path, log_to: str) -> list[str]:
    return [type(logger).__name__ for logger in make_loggers(folder, "0123456789", log_to)]


def test_one_setting_chooses_where_metrics_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert kinds(tmp_path, "wandb") == ["OnceWandbLogger", "MetricsLogger"]
    assert kinds(tmp_path, "csv") == ["MetricsLogger"]
    pytest.importorskip("tensorboard")
    assert kinds(tmp_path, "tensorboard") == ["OnceTensorBoardLogger", "MetricsLogger"]


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_writes_the_wandb_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(variable, "1")
    assert kinds(tmp_path, "wandb") == ["OnceWandbLogger", "MetricsLogger"] and not (tmp_path / "wandb_id").exists()
    monkeypatch.setenv(variable, "0")
    run_id = wandb_runs.wandb_run_id(tmp_path, "0123456789")
    assert run_id == wandb_runs.wandb_run_id(tmp_path, "0123456789") and len(run_id) == 16
    monkeypatch.setenv(variable, "1")
    wandb_runs.wandb_run_id(tmp_path, "another")
    assert (tmp_path / "wandb_id").read_text() == run_id


def test_without_tensorboard_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr("experiments.runs.loggers.OnceTensorBoardLogger", absent)
    with pytest.raises(LoggerMissing, match=r"log_to=tensorboard needs a package: pip install -e '\.\[tensorboard\]'$"):
        make_loggers(tmp_path, "0123456789", "tensorboard")


@pytest.mark.parametrize("environment", OFF)
def test_wandb_that_is_switched_off_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert kinds(tmp_path, "wandb") == ["MetricsLogger"]
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("W&B was asked"))
    wandb_runs.log_evaluation(tmp_path, "k", {"a": 1.0}, {})
    wandb_runs.log_summary(tmp_path, {"a": 1.0}, {})
    assert list(tmp_path.iterdir()) == [], "neither a run nor its id"


@pytest.mark.parametrize("value", ["", "0", "false", "off"])
def test_wandb_disabled_may_say_no(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert wandb_runs.choose_wandb_mode() == "offline"


def test_a_run_that_logs_to_files_alone_is_trained_and_evaluated(workbench: Workbench, monkeypatch) -> None:
    monkeypatch.setattr(OnceWandbLogger, "__init__", lambda *_, **__: pytest.fail("W&B was asked"))
    train.main(["--config", workbench.training("cot_sft"), "--log_to=csv"])
    phase = workbench.outputs / "tiny/cot_sft"
    assert "train/loss" in (phase / "metrics.csv").read_text() and not (phase / "wandb").exists()
    settings = {"data_root": str(workbench.root), "model": str(phase / "merged"), "decoding": {"max_new_tokens": 4}}
    evaluate.main(["--config", workbench.write_yaml("eval", settings)])
    assert not (phase / "wandb").exists(), "a phase that was trained without W&B gets no run"
    settings = yaml.safe_load((phase / "config.yaml").read_text())
    other = settings | {"log_to": "tensorboard"}
    assert run_key(settings) == run_key(other), "where metrics go is no part of a run"


def test_tensorboard_has_the_metrics_of_a_run(workbench: Workbench) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main(["--config", workbench.training("cot_sft"), "--log_to=tensorboard"])
    events = accumulator.EventAccumulator(str(workbench.outputs / "tiny/cot_sft/tensorboard/0"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1], "each batch once"
