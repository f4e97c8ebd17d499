"""The log is read as one run wrote it: over ranks, kills and resumes."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.rollout_log import RolloutLog, read_index


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
    assert (first.update, first.task, first.mean_reward, first.mean_accuracy) == (0, "diff", 1.0, 0.5)


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


def test_without_a_log_there_is_nothing(tmp_path: Path) -> None:
    assert read_index(tmp_path / "r.jsonl") == []
