"""What is in a run's key: what its results depend on, by content, and nothing else."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules.persistence.files import write_json
from datamodules.streaming.shard_writer import ShardWriter
from experiments.runs import run_key
from tests.datamodules.encoding.tiny_processor import make_sample


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    with ShardWriter(tmp_path / "shards", max_samples=2) as writer:
        for index in range(4):
            writer.add(make_sample(f"s{index}", ((14, 14), (28, 14))))
    write_json(tmp_path / "model/config.json", {})
    model = {"model": str(tmp_path / "model"), "learning_rate": 1e-4, "max_tokens_per_row": 4096}
    model |= {"rollout": {"group_size": 4}, "loss": {"kl_beta": 0.1}, "update": {"minibatches": 1}}
    callbacks = [
        {"class_path": "callbacks.collapse_guard.CollapseGuard", "init_args": {"action": "warn", "average_over": 5}},
        {"class_path": "callbacks.mig_bench.MIGBench", "init_args": {"annotations": "a.json", "every_n_steps": 5}},
        {"class_path": "callbacks.rejection_sampling.RejectionSampling", "init_args": {"num_samples": 4}},
    ]
    return {
        "seed_everything": 0,
        "experiment": "nano",
        "phase": "grpo",
        "outputs": "outputs",
        "model": {"class_path": "lightning_modules.grpo.GRPO", "init_args": model},
        "data": {"shards": str(tmp_path / "shards"), "processor": model["model"], "batch_size": 2, "num_workers": 0},
        "trainer": {"max_steps": 5, "devices": 1, "callbacks": callbacks},
    }


def with_value(settings: dict, place: str, value: Any) -> dict:
    found = copy.deepcopy(settings)
    *parts, last = place.split("/")
    inner: Any = found
    for part in parts:
        inner = inner[int(part) if part.isdecimal() else part]
    inner[last] = value
    return found


CALLBACK = "trainer/callbacks/{}/init_args"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("experiment", "other"), ("phase", "other"), ("outputs", "elsewhere"),
        ("data/num_workers", 8), ("data/verify_shards", False),
        ("trainer/logger", False), ("trainer/log_every_n_steps", 7), ("trainer/enable_progress_bar", False),
        ("trainer/profiler", "simple"), ("trainer/enable_checkpointing", False), ("trainer/num_sanity_val_steps", 0),
        ("trainer/val_check_interval", 0.5), ("trainer/inference_mode", False), ("trainer/detect_anomaly", True),
        ("model/init_args/rollout/log", "r.jsonl"), ("model/init_args/rollout/vllm", {"servers": ["http://a"]}),
        ("model/init_args/update/max_idle_windows", 3),
        ("model/init_args/feature_cache", "cache"), ("model/init_args/feature_cache_gib", 3.0),
        ("model/init_args/gradient_checkpointing", True), ("model/init_args/activation_gib", 3.0),
        (f"{CALLBACK.format(0)}/window", 9), (f"{CALLBACK.format(0)}/action", "stop"),
        (f"{CALLBACK.format(2)}/shared", "elsewhere"), (f"{CALLBACK.format(2)}/folder", "elsewhere"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_on_results_is_not_in_the_key(settings: dict, place: str, value: object) -> None:
    assert run_key.run_key(with_value(settings, place, value)) == run_key.run_key(settings)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("seed_everything", 1), ("data/batch_size", 3), ("data/strict", True), ("data/new_setting", 1),
        ("trainer/max_steps", 6), ("trainer/devices", 2), ("trainer/deterministic", True), ("trainer/new_setting", 1),
        ("model/init_args/learning_rate", 1.0), ("model/init_args/max_tokens_per_row", 1),
        ("model/init_args/rollout/group_size", 5), ("model/init_args/update/minibatches", 2),
        ("model/init_args/new_setting", 1), ("model/class_path", "lightning_modules.cot_sft.CoTSFT"),
        (f"{CALLBACK.format(0)}/action", "roll_back"), (f"{CALLBACK.format(1)}/every_n_steps", 6),
        (f"{CALLBACK.format(2)}/num_samples", 6),
    ],
)  # fmt: skip
def test_any_other_setting_is_in_the_key(settings: dict, place: str, value: object) -> None:
    assert run_key.run_key(with_value(settings, place, value)) != run_key.run_key(settings)


def test_callbacks_that_show_save_or_time_a_run_are_not_in_the_key(settings: dict) -> None:
    more = [{"class_path": name, "init_args": {}} for name in run_key.CALLBACKS_NOT_IN_KEY]
    found = with_value(settings, "trainer/callbacks", [*settings["trainer"]["callbacks"], *more])
    assert len(more) >= 5 and run_key.run_key(found) == run_key.run_key(settings)


def test_every_name_that_is_left_out_is_one_of_the_trainer_s() -> None:
    import inspect

    assert set(run_key.TRAINER_NOT_IN_KEY) <= set(inspect.signature(Trainer.__init__).parameters)


def change_label(shard: Path) -> None:
    data = shard.read_bytes()
    with shard.open("r+b") as file:
        file.write(data.replace(b'"label": "dog"', b'"label": "cat"'))
    assert shard.stat().st_size == len(data)


def test_the_key_is_of_contents_not_of_paths(settings: dict, tmp_path: Path) -> None:
    key = run_key.run_key(settings)
    for name in ("shards", "model"):
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name)
    copied = with_value(settings, "data/shards", str(tmp_path / "copy/shards"))
    copied = with_value(copied, "model/init_args/model", str(tmp_path / "copy/model"))
    copied = with_value(copied, "data/processor", str(tmp_path / "copy/model"))
    assert run_key.run_key(copied) == key
    change_label(tmp_path / "copy/shards/shard-00001.tar")
    assert run_key.run_key(copied) != key == run_key.run_key(settings)
    write_json(tmp_path / "model/config.json", {"changed": 1})
    assert run_key.run_key(settings) != key


def test_not_to_compare_shards_is_in_the_key_where_it_matters(settings: dict, tmp_path: Path) -> None:
    trusting = with_value(settings, "data/verify_shards", False)
    assert run_key.run_key(trusting) == run_key.run_key(settings)
    change_label(tmp_path / "shards/shard-00000.tar")
    assert run_key.run_key(trusting) != run_key.run_key(settings), "its samples are trained on, or rejected"


def test_the_code_of_what_a_configuration_names_is_recorded(settings: dict) -> None:
    code = run_key.made_of(settings).code
    assert {"lightning_modules/grpo.py", "callbacks/collapse_guard.py", "experiments/train.py"} < set(code)
    assert os.path.basename(__file__) not in str(code)
