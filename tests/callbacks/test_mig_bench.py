"""The MIGBench callback and the evaluation without a Trainer, with scripted answers and once with a real tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks.checkpoints import RunStopped
from callbacks.evaluation import EvaluationSettings
from callbacks.mig_bench import MIGBench, evaluate_mig_bench, limit_tasks, policy_fingerprint
from callbacks.previews import Previews
from datamodules.benchmarks.mig_bench import load_images, load_mig_bench
from datamodules.metrics.mig_scoring import summarise
from datamodules.persistence.files import Journal
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import NativeEngine
from tests.callbacks.conftest import FakeEngine, FakeModule, FakePolicy, read_rows, resuming, true_answer
from tests.lightning_modules.ranks import run_ranks

SETTINGS = EvaluationSettings(max_new_tokens=8, batch_prompts=1)  # windows of four questions


def half_right(item, k: int) -> str:
    """Right where the question is one of the file's even ones."""
    return true_answer(item) if int(item.sample.id.split("/")[1]) % 2 == 0 else "I do not know."


def test_every_question_gets_one_prediction_in_the_files_order(bench, encoder) -> None:
    samples, _ = load_mig_bench(*bench)
    engine = FakeEngine(half_right)
    load = partial(load_images, image_root=bench[1])
    predictions = evaluate_mig_bench(FakePolicy("p"), engine, encoder, samples, load, SETTINGS, show_progress=False)
    assert [p.id for p in predictions] == [s.id for s in samples]
    assert sorted(engine.asked) == sorted(s.id for s in samples)
    summary = summarise(predictions)
    assert summary["tasks"] == {"diff": 50.0, "common_object": 50.0, "region": 50.0}
    assert summary["format_rate"] == 50.0 and summary["parse_failures"] == {"no_json": 6}


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_predictions(bench, encoder, tmp_path: Path) -> None:
    samples, _ = load_mig_bench(*bench)
    load = partial(load_images, image_root=bench[1])
    given = {"encoder": encoder, "samples": samples, "load": load, "settings": SETTINGS, "show_progress": False}
    run = partial(evaluate_mig_bench, **given)
    whole = run(FakePolicy("p"), FakeEngine(half_right))
    path = tmp_path / "predictions.jsonl"

    class Dying(FakeEngine):
        def generate(self, items, *args, **kwargs):
            if len(self.asked) >= 8:
                raise KeyboardInterrupt
            return super().generate(items, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(FakePolicy("p"), Dying(half_right), journal=Journal(path, "key"))
    assert len(path.read_text().splitlines()) == 8
    second = FakeEngine(half_right)
    assert run(FakePolicy("p"), second, journal=Journal(path, "key")) == whole
    assert len(second.asked) == 4
    assert run(FakePolicy("p"), FakeEngine(half_right), journal=Journal(path, "key")) == whole
    third = FakeEngine(half_right)
    run(FakePolicy("p"), third, journal=Journal(path, "another key"))
    assert len(third.asked) == 12


def test_a_damaged_image_counts_as_wrong_under_its_name(bench, encoder, caplog) -> None:
    samples, _ = load_mig_bench(*bench)
    damaged = bench[1] / samples[0].images[1]
    damaged.write_bytes(damaged.read_bytes()[:60])
    load = partial(load_images, image_root=bench[1])
    engine = FakeEngine(true_answer)
    predictions = evaluate_mig_bench(FakePolicy("p"), engine, encoder, samples, load, SETTINGS, show_progress=False)
    summary = summarise(predictions)
    assert summary["n"] == 12 and summary["tasks"]["diff"] == 75.0
    assert summary["parse_failures"] == {"truncated_image": 1}
    assert "mig_bench/0" in caplog.text


def test_a_limit_takes_questions_from_all_over_each_task(bench) -> None:
    samples, _ = load_mig_bench(*bench)
    assert [s.id for s in limit_tasks(samples, 2)] == [f"mig_bench/{n}" for n in (0, 2, 4, 6, 8, 10)]
    assert limit_tasks(samples, None) == limit_tasks(samples, 99) == samples


def test_the_callback_evaluates_before_inside_and_after_and_logs(bench, fit, tiny_model_dir, tmp_path: Path) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    callback = MIGBench(
        str(bench[0]), str(bench[1]), before=True, after=True, every_n_steps=2, validation_limit_per_task=1
    )
    logger = CSVLogger(tmp_path / "log")
    fit(module, [callback], max_steps=3, logger=logger, log_every_n_steps=1)
    folder = tmp_path / "run/mig_bench"
    assert sorted(path.name for path in folder.iterdir()) == ["after", "before", "step_000002"]
    after = json.loads((folder / "after/mig_bench.json").read_text())
    assert after["n"] == 12 and after["step"] == 3
    assert len((folder / "after/predictions.jsonl").read_text().splitlines()) == 12
    assert json.loads((folder / "step_000002/mig_bench.json").read_text())["n"] == 3
    # The policy has moved in between, so nothing was taken over from "before".
    assert json.loads((folder / "before/mig_bench.json").read_text())["key"] != after["key"]
    rows = read_rows(logger)
    logged = [row["step"] for row in rows if row["mig_bench_val/avg"]]
    assert logged[0] == "0" and logged[-1] == "3" and len(logged) == 3
    names = {"diff", "in_domain", "mean_tokens"}
    assert {f"mig_bench_val/{name}" for name in names} <= set(rows[0])
    assert not any(name.startswith("mig_bench/") for name in rows[0]), "that is the benchmark, asked between phases"


@resuming
def test_a_finished_run_that_is_started_again_gets_only_what_is_missing(bench, fit, tiny_model_dir, tmp_path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=1)
    fit(FakeModule(str(tiny_model_dir), FakeEngine(half_right)), [checkpoints], enable_checkpointing=True)
    engine = FakeEngine(half_right)
    module = FakeModule(str(tiny_model_dir), engine)
    callback = MIGBench(str(bench[0]), str(bench[1]), before=True, after=True)
    fit(module, [callback, checkpoints], enable_checkpointing=True, ckpt_path=tmp_path / "ckpt/last.ckpt")
    assert module.seen == []
    assert len(engine.asked) == 12
    assert [path.name for path in (tmp_path / "run/mig_bench").iterdir()] == ["after"]


class AtBatchStart(Callback):
    """Calls something before a batch is trained on, by its number."""

    def __init__(self, calls: dict) -> None:
        self.calls = calls

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.calls.get(batch_idx, lambda: None)()


def test_on_a_full_disk_an_evaluation_in_training_is_left_out(
    bench, fit, tiny_model_dir, small_disk, tmp_path, caplog
) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    disk = AtBatchStart({1: small_disk.fill, 2: small_disk.make_room})
    callback = MIGBench(str(bench[0]), str(bench[1]), every_n_steps=1, folder=str(small_disk.root / "mig_bench"))
    logger = CSVLogger(tmp_path / "log")
    fit(module, [disk, callback], max_steps=3, logger=logger, log_every_n_steps=1)
    assert len(module.seen) == 2 * 3
    whole = sorted(path.parent.name for path in (small_disk.root / "mig_bench").glob("*/mig_bench.json"))
    assert whole == ["step_000001", "step_000003"]
    assert "step_000002 is left out: " in caplog.text and "MiB free" in caplog.text
    assert len([row for row in read_rows(logger) if row["mig_bench_val/avg"]]) == 2


def test_an_evaluation_that_the_run_is_asked_for_must_be_written(bench, fit, tiny_model_dir, small_disk) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    callback = MIGBench(str(bench[0]), str(bench[1]), after=True, folder=str(small_disk.root / "mig_bench"))
    with pytest.raises(RunStopped, match=r"MIG-Bench, after: .*cannot be written.*MiB free"):
        fit(module, [AtBatchStart({1: small_disk.fill}), callback], max_steps=2)


def test_where_one_rank_cannot_write_all_leave_the_evaluation_out(bench, fit, tiny_model_dir, tmp_path: Path) -> None:
    (tmp_path / "mig_bench/step_000001/predictions-rank1.jsonl").mkdir(parents=True)  # no file to append to

    def work() -> int:
        module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
        callback = MIGBench(str(bench[0]), str(bench[1]), every_n_steps=1, folder=str(tmp_path / "mig_bench"))
        fit(module, [callback], max_steps=2, strategy="ddp", devices=2)
        return len(module.seen)

    assert run_ranks(2, work) == [4, 4]
    assert [path.parent.name for path in (tmp_path / "mig_bench").glob("*/mig_bench.json")] == ["step_000002"]


def test_a_summary_that_cannot_be_written_ends_no_training(bench, fit, tiny_model_dir, tmp_path: Path, caplog) -> None:
    home = tmp_path / "mig_bench"
    for name in ("step_000001", "after"):
        (home / name / "mig_bench.json").mkdir(parents=True)  # no file to replace
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    callback = MIGBench(str(bench[0]), str(bench[1]), every_n_steps=1, after=True, folder=str(home))
    with pytest.raises(RunStopped, match=r"MIG-Bench, after: .*mig_bench\.json"):
        fit(module, [callback], max_steps=3)
    assert len(module.seen) == 2 * 3 and "step_000001 is left out: " in caplog.text
    assert (home / "step_000002/mig_bench.json").is_file()


def test_into_the_place_that_a_lost_filesystem_left_nothing_is_written(bench, fit, tiny_model_dir, small_disk) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    evaluation = MIGBench(str(bench[0]), str(bench[1]), every_n_steps=1, folder=str(small_disk.root / "mig_bench"))
    previews = Previews(str(bench[0]), str(bench[1]), every_n_steps=1, folder=str(small_disk.root / "previews"))
    fit(module, [AtBatchStart({1: small_disk.lose}), evaluation, previews], max_steps=3)
    assert len(module.seen) == 2 * 3
    assert list(small_disk.root.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (MIGBench, "every_n_steps", -5),
        (MIGBench, "validation_limit_per_task", 0),
        (MIGBench, "batch_prompts", 0),
        (Previews, "every_n_steps", 0),
        (Previews, "num_per_task", 0),
        (Previews, "max_new_tokens", 0),
    ],
)
def test_settings_that_would_ask_nothing_are_refused_at_once(kind: type, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be greater than 0"):
        kind("MIG_data.json", "data", **{name: value})


def test_a_wrong_image_root_fails_before_the_model_is_built(bench, fit, tiny_model_dir, tmp_path: Path) -> None:
    class Unbuildable(FakeModule):
        def configure_model(self) -> None:
            raise AssertionError("the model was built first")

    with pytest.raises(FileNotFoundError, match="benchmark images"):
        fit(Unbuildable(str(tiny_model_dir), FakeEngine(half_right)), [MIGBench(str(bench[0]), str(tmp_path))])


def test_a_real_model_is_evaluated_greedily_and_the_same_twice(bench, encoder, tiny_model_dir) -> None:
    samples, _ = load_mig_bench(*bench)
    policy = QwenVL(str(tiny_model_dir))
    load = partial(load_images, image_root=bench[1])
    run = partial(evaluate_mig_bench, policy, NativeEngine(policy), encoder, samples[::4], load, show_progress=False)
    first = run(EvaluationSettings(max_new_tokens=6, batch_prompts=2))
    assert len(first) == 3 and all(0 < p.num_tokens <= 6 for p in first)
    assert [p.text for p in run(EvaluationSettings(max_new_tokens=6, batch_prompts=1))] == [p.text for p in first]


def test_the_policys_hash_follows_what_is_trained() -> None:
    policy = FakePolicy("owner/name").to(torch.bfloat16)
    before = policy_fingerprint(policy)
    assert policy_fingerprint(policy) == before
    with torch.no_grad():
        policy.model.weight[0, 0] += 1
    assert policy_fingerprint(policy) != before
