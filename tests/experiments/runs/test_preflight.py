"""Faults that are found before weights are loaded."""

from pathlib import Path

from datamodules.streaming.manifest import write_manifest
from experiments.runs.preflight import held_out_problems


def shard(digit: str) -> dict:
    return {"name": "shard-00000.tar", "count": 3, "bytes": 2048, "sha256": 64 * digit, "tasks": {"diff": 3}}


def test_held_out_shards_must_be_there_and_not_be_trained_on(tmp_path: Path) -> None:
    for name, entries in (("train", [shard("a")]), ("held", [shard("b")]), ("empty", [])):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, entries)
    train, held, empty = (str(tmp_path / name) for name in ("train", "held", "empty"))
    assert held_out_problems(held, [train]) == []
    (missing,) = held_out_problems([held, str(tmp_path / "none")], [train])
    assert "HeldOutLoss: shards=" in missing and "none" in missing
    (counted,) = held_out_problems(empty, [train])
    assert "no sample" in counted
    (both,) = held_out_problems([held, train + "/."], [train])
    assert "must not be trained on" in both
