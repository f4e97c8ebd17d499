"""Faults that are found before weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.streaming.manifest import write_manifest
from experiments.runs import preflight
from experiments.runs.preflight import held_out_problems, size_problems


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
    write_manifest(tmp_path, [shard("b") | {"name": "held/shard-00000.tar"}])  # a folder above others
    (below,) = held_out_problems(held, [str(tmp_path)])
    assert "must not be trained on" in below


def test_shards_are_not_trained_on_twice(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    write_manifest(tmp_path / "val", [shard("a")])
    write_manifest(tmp_path, [shard("a") | {"name": "val/shard-00000.tar"}])
    data = {"shards": [str(tmp_path), str(tmp_path / "val")], "batch_size": 1}
    (twice,) = size_problems({"data": data, "trainer": {}})
    assert "two sources of shards hold" in twice and "val/shard-00000.tar" in twice
    assert size_problems({"data": data | {"shards": str(tmp_path)}, "trainer": {}}) == []


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        ({"max_steps": 5}, None),
        ({"max_steps": -1, "max_epochs": 2}, None),
        ({"max_steps": -1, "max_epochs": None}, None),  # Lightning makes 1000 epochs
        ({"max_steps": 5, "max_epochs": -1}, None),
        ({"max_steps": -1, "max_epochs": -1}, "max_epochs=-1 give none"),
        ({"max_steps": -1, "max_epochs": None, "max_time": "00:01:00:00"}, "max_epochs=None give none"),
        ({"max_steps": -1, "callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}]}, "give none"),
        ({"max_steps": 0}, "trainer.max_steps=0"),
        ({"max_steps": -2}, "trainer.max_steps=-2"),
        ({"max_steps": 5, "max_epochs": -2}, "trainer.max_epochs=-2"),
    ],
)
def test_a_run_needs_an_end(trainer: dict, named: str | None) -> None:
    problems = preflight.length_problems(trainer)
    assert len(problems) == (named is not None) and all(named in problem for problem in problems)


@pytest.mark.parametrize(
    ("strategy", "every", "named"),
    [
        ("auto", None, None),
        ("ddp", 10, None),
        ("ddp_find_unused_parameters_true", None, None),
        ("sharded", None, None),
        ({"class_path": "lightning_modules.training.fsdp_strategy.ShardedStrategy"}, None, None),
        ({"class_path": "my.own.Strategy"}, None, None),
        ("sharded", 10, "model.loss.reference_every=10 with trainer.strategy='sharded'"),
        ({"class_path": "lightning_modules.training.fsdp_strategy.ShardedStrategy"}, 10, "reference_every=10"),
        ("fsdp", None, "trainer.strategy='fsdp': FSDP1"),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, None, "FSDP1"),
        ("dpp", None, "trainer.strategy='dpp' does not exist; did you mean ddp?"),
    ],
)
def test_a_strategy_must_fit(strategy: object, every: int | None, named: str | None) -> None:
    problems = preflight.strategy_problems({"strategy": strategy}, {"loss": {"reference_every": every}})
    assert len(problems) == (named is not None) and all(named in problem for problem in problems)
    assert preflight.strategy_problems({"strategy": "sharded"}, {}) == [], "CoT-SFT has no loss settings"


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        ({"accelerator": "cpu", "devices": "auto"}, None),
        ({"accelerator": "cpu", "devices": 2, "num_nodes": 1}, None),
        ({"accelerator": "auto", "devices": "2"}, None),
        ({"accelerator": "cpu", "devices": 0}, "trainer.devices=0"),
        ({"accelerator": "cpu", "devices": "0"}, "trainer.devices='0'"),
        ({"accelerator": "cpu", "devices": -1}, "trainer.devices=-1"),
        ({"accelerator": "auto", "devices": "-1"}, "trainer.devices='-1'"),
        ({"accelerator": "cpu", "devices": [0]}, "trainer.devices=[0]"),
        ({"accelerator": "gpu", "devices": []}, "trainer.devices=[]"),
        ({"accelerator": "cpu", "devices": "two"}, "trainer.devices='two'"),
        ({"accelerator": "cpu", "devices": 1, "num_nodes": 0}, "trainer.num_nodes=0"),
        ({"accelerator": "cpuu", "devices": 1}, "trainer.accelerator='cpuu' must be one of"),
        ({"accelerator": "gpu", "devices": -1}, "PyTorch finds no GPU here"),
    ],
)
def test_devices_that_lightning_would_refuse_are_named(trainer: dict, named: str | None, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    problems = preflight.device_problems(trainer)
    assert len(problems) == (named is not None) and all(named in problem for problem in problems)
