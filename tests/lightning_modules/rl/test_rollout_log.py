"""The log is read as one run wrote it: over ranks, kills and resumes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_modules.rl.rollout_log import RolloutLog, read_index
from tests.conftest import SmallDisk


def group(batch: int, name: str, text: str = "a") -> dict:
    rewards = [{"total": 0.5, "accuracy": 0.25, "format": 1.0, "failure": None}, {"total": 1.5, "accuracy": 0.75}]
    found = {"update": batch // 2, "batch": batch, "id": name, "task": "diff", "texts": [text, "b"], "rewards": rewards}
    return found | {"advantages": [-0.7, 0.7], "equal": False}


def names(path: Path) -> list[tuple[int, str]]:
    return [(found.batch, found.id) for found in read_index(path)]


def test_groups_come_back_as_written(tmp_path: Path) -> None:
    hostile = "line\u2028separator\x85 </script> \ufffd"
    RolloutLog(tmp_path / "deep" / "r.jsonl").append([group(0, "x", hostile), group(0, "y")])
    first, second = read_index(tmp_path / "deep" / "r.jsonl")
    assert first.read() == group(0, "x", hostile) and second.read()["id"] == "y"
    assert (first.update, first.task, first.mean_reward, first.mean_iou) == (0, "diff", 1.0, 0.5)


def test_the_iou_is_read_whatever_the_rewards_are(tmp_path: Path) -> None:
    rewards = [{"total": 0.1, "short": 0.1, "failure": None}, {"total": 0.2, "short": 0.2, "failure": None}]
    RolloutLog(tmp_path / "r.jsonl").append([group(0, "x") | {"rewards": rewards, "ious": [0.5, 1.0]}])
    (found,) = read_index(tmp_path / "r.jsonl")
    assert (found.mean_reward, found.mean_iou) == (pytest.approx(0.15), 0.75)


def test_a_line_cut_short_is_dropped_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RolloutLog(path).append([group(0, "x"), group(0, "y")])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        RolloutLog(path).append([group(0, "x", "again"), group(0, "y", "again")])
        assert names(path) == [(0, "x"), (0, "y")], length
        assert [found.read()["texts"][0] for found in read_index(path)] == ["again", "again"], length


def test_of_a_resumed_run_the_last_line_of_a_group_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for batches, text in (((0, 1, 2), "first"), ((1, 2, 3), "second")):
        log = RolloutLog(path)
        for batch in batches:
            log.append([group(batch, "x", text), group(batch, "y", text)])
    assert names(path) == [(batch, name) for batch in range(4) for name in "xy"]
    assert [found.read()["texts"][0] for found in read_index(path)] == ["first"] * 2 + ["second"] * 6


def test_ranks_are_read_as_one_run(tmp_path: Path) -> None:
    for rank in (1, 0, 10):
        log = RolloutLog(tmp_path / "r.jsonl", rank, 11)
        log.append([group(0, f"rank {rank}")])
        log.append([group(1, f"rank {rank}")])
    assert not (tmp_path / "r.jsonl").exists()
    assert names(tmp_path / "r.jsonl") == [(batch, f"rank {rank}") for batch in (0, 1) for rank in (0, 1, 10)]


def write(path: Path, rank: int, world_size: int, batches: range, text: str = "first") -> None:
    """What one process of a run adds."""
    log = RolloutLog(path, rank, world_size)
    for batch in batches:
        log.append([group(batch, f"{text} {batch}/{rank}", text)])


def test_what_a_rollback_has_left_behind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, 0, 1, range(6))
    write(path, 0, 1, range(3, 5), "second")  # other samples, in the place of batches 3, 4 and 5
    assert names(path) == [*((b, f"first {b}/0") for b in range(3)), *((b, f"second {b}/0") for b in (3, 4))]


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1), (1, 2), (2, 4)])
def test_a_rank_that_is_no_more_says_nothing_of_later_batches(tmp_path: Path, before: int, after: int) -> None:
    path = tmp_path / "r.jsonl"
    for rank in range(before):
        write(path, rank, before, range(6))
    with max(tmp_path.iterdir()).open("a") as file:
        file.write('{"cut short')
    for rank in reversed(range(after)):
        write(path, rank, after, range(4, 7), "second")
    expected = [(b, f"first {b}/{rank}") for b in range(4) for rank in range(before)]
    assert names(path) == expected + [(b, f"second {b}/{rank}") for b in range(4, 7) for rank in range(after)]
    assert [found.read()["id"] for found in read_index(path)] == [name for _, name in names(path)]


def test_on_a_full_disk_groups_are_left_out_and_counted(small_disk: SmallDisk, caplog) -> None:
    path = small_disk.root / "run/r.jsonl"
    log = RolloutLog(path)
    with caplog.at_level(logging.WARNING, "lightning_modules.rl.rollout_log"):
        for batch in range(5):
            if batch == 1:
                small_disk.fill()
            if batch == 3:
                small_disk.make_room()
            log.append([group(batch, "x", "long " * 1000)])
    assert names(path) == [(batch, "x") for batch in (0, 3, 4)]
    first, last = [record.message for record in caplog.records]
    assert "0.0 MiB free" in first and str(path) in first
    assert "2 groups are missing" in last


def test_into_the_place_that_a_lost_filesystem_left_nothing_is_written(small_disk: SmallDisk) -> None:
    log = RolloutLog(small_disk.root / "run/r.jsonl")
    log.append([group(0, "x")])
    small_disk.lose()
    log.append([group(1, "x")])
    assert list(small_disk.root.iterdir()) == []


def test_without_a_log_there_is_nothing(tmp_path: Path) -> None:
    assert read_index(tmp_path / "r.jsonl") == []


def test_a_copy_beside_the_log_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RolloutLog(path, 0, 2).append([group(0, "x")])
    RolloutLog(path, 1, 2).append([group(0, "y")])
    for name in ("r-rank0.bak.jsonl", "r-rankx.jsonl", "other-rank0.jsonl", "0.jsonl"):
        (tmp_path / name).write_text("{}\n")
    RolloutLog(path, 0, 2).append([group(1, "z")])
    assert names(path) == [(0, "x"), (0, "y"), (1, "z")]
