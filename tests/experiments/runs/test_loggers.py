from __future__ import annotations

import logging
from pathlib import Path

import pytest

from experiments.runs import metrics_csv
from experiments.runs.loggers import MetricsLogger
from tests.conftest import SmallDisk


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
