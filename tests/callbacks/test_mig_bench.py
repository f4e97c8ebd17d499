"""The MIGBench callback and the evaluation without a Trainer, with scripted answers and once with a real tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks.benchmark_evaluation import BenchmarkEvaluation
from callbacks.checkpoints import RunStopped
from callbacks.mig_bench import MIGBench
from callbacks.previews import Previews
from datamodules.benchmarks import mig_bench
from datamodules.benchmarks.base import limit_columns
from datamodules.metrics.scoring import score_replies
from datamodules.persistence.files import StorageError
from datamodules.persistence.user_error import UserError
from datamodules.synthetic.benchmark_replicas.write import write_replica
from lightning_modules.metrics.summary import summarise
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors import ask
from lightning_modules.predictors.ask import ask_share, read_answers
from lightning_modules.predictors.base import Decoding
from lightning_modules.predictors.policy import PolicyPredictor
from lightning_modules.rollouts.native.engine import NativeEngine
from tests.callbacks.conftest import FakeEngine, FakeModule, FakePolicy, read_rows, resuming, true_answer
from tests.lightning_modules.ranks import run_ranks


def half_right(item, k: int) -> str:
    """Right where the question is one of the file's even ones."""
    return true_answer(item) if int(item.sample.id.split("/")[1]) % 2 == 0 else "I do not know."


def policy_predictor(engine: FakeEngine, encoder) -> PolicyPredictor:
    return PolicyPredictor(FakePolicy("p"), engine, encoder, Decoding(max_new_tokens=8, prompts_per_batch=1))


def test_every_question_gets_one_prediction_in_the_files_order(bench, encoder, tmp_path: Path) -> None:
    questions = mig_bench.load_files(*bench)
    engine = FakeEngine(half_right)
    predictor = policy_predictor(engine, encoder)
    assert list(ask_share(predictor, questions.samples, questions, tmp_path, "key")) == [0, 4, 4, 4, 0]
    assert sorted(engine.asked) == sorted(s.id for s in questions.samples)
    replies = read_answers(tmp_path, "key")
    predictions = score_replies(questions, questions.samples, replies, predictor.box_format)
    assert [p.id for p in predictions] == [s.id for s in questions.samples]
    result = summarise(predictions, questions.rule, questions.official, questions.averages)
    tasks = {task: cell["score"] for task, cell in result["columns"].items()}
    assert tasks == {"diff": 50.0, "common_object": 50.0, "region": 50.0}
    assert result["format_rate"] == 50.0 and result["failures"] == {"no_json": 6}


def test_a_damaged_image_counts_as_wrong_under_its_name(bench, encoder, caplog) -> None:
    questions = mig_bench.load_files(*bench)
    damaged = bench[1] / questions.samples[0].images[1]
    damaged.write_bytes(damaged.read_bytes()[:60])
    predictor = policy_predictor(FakeEngine(true_answer), encoder)
    replies = {s.id: reply for s, reply in predictor.answers(questions.samples, questions.load)}
    predictions = score_replies(questions, questions.samples, replies, encoder.box_format)
    assert [p.failure for p in predictions] == ["truncated_image"] + [None] * 11
    assert not predictions[0].correct and all(p.correct for p in predictions[1:])
    assert "mig_bench/0" in caplog.text


def test_a_limit_takes_questions_from_all_over_each_task(bench) -> None:
    samples = mig_bench.load_files(*bench).samples
    assert [s.id for s in limit_columns(samples, 2)] == [f"mig_bench/{n}" for n in (0, 2, 4, 6, 8, 10)]
    assert limit_columns(samples, None) == limit_columns(samples, 99) == tuple(samples)


def test_the_callback_evaluates_before_inside_and_after_and_logs(bench, fit, tiny_model_dir, tmp_path: Path) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    callback = MIGBench(
        str(bench[0]), str(bench[1]), before=True, after=True, every_n_steps=2, validation_limit_per_task=1
    )
    logger = CSVLogger(tmp_path / "log")
    fit(module, [callback], max_steps=3, logger=logger, log_every_n_steps=1)
    folder = tmp_path / "run/mig_bench"
    assert sorted(path.name for path in folder.iterdir()) == ["after", "before", "step_000002"]
    after = json.loads((folder / "after/result.json").read_text())
    assert after["n"] == 12 and after["step"] == 3
    assert len((folder / "after/predictions.jsonl").read_text().splitlines()) == 12
    assert json.loads((folder / "step_000002/result.json").read_text())["n"] == 3
    # The policy has moved in between, so nothing was taken over from "before".
    assert json.loads((folder / "before/result.json").read_text())["key"] != after["key"]
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
    whole = sorted(path.parent.name for path in (small_disk.root / "mig_bench").glob("*/result.json"))
    assert whole == ["step_000001", "step_000003"]
    assert "step_000002 is left out: " in caplog.text and "MiB free" in caplog.text
    assert len([row for row in read_rows(logger) if row["mig_bench_val/avg"]]) == 2


def test_an_evaluation_that_the_run_is_asked_for_must_be_written(bench, fit, tiny_model_dir, small_disk) -> None:
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    callback = MIGBench(str(bench[0]), str(bench[1]), after=True, folder=str(small_disk.root / "mig_bench"))
    with pytest.raises(RunStopped, match=r"mig_bench, after: .*cannot be written.*MiB free"):
        fit(module, [AtBatchStart({1: small_disk.fill}), callback], max_steps=2)


def test_where_one_rank_cannot_write_all_leave_the_evaluation_out(bench, fit, tiny_model_dir, tmp_path: Path) -> None:
    class FullDisk(ask.Journal):
        def append(self, records) -> None:
            raise StorageError(28, "cannot be written", str(self.path))

    def work() -> int:
        if os.environ["RANK"] == "1":
            calls = iter([FullDisk])  # at the first evaluation
            ask.Journal = lambda *how, journal=ask.Journal: next(calls, journal)(*how)
        module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
        callback = MIGBench(str(bench[0]), str(bench[1]), every_n_steps=1, folder=str(tmp_path / "mig_bench"))
        fit(module, [callback], max_steps=2, strategy="ddp", devices=2)
        return len(module.seen)

    assert run_ranks(2, work) == [4, 4]
    assert [path.parent.name for path in (tmp_path / "mig_bench").glob("*/result.json")] == ["step_000002"]


def test_a_summary_that_cannot_be_written_ends_no_training(bench, fit, tiny_model_dir, tmp_path: Path, caplog) -> None:
    home = tmp_path / "mig_bench"
    for name in ("step_000001", "after"):
        (home / name / "result.json").mkdir(parents=True)  # no file to replace
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    callback = MIGBench(str(bench[0]), str(bench[1]), every_n_steps=1, after=True, folder=str(home))
    with pytest.raises(RunStopped, match=r"mig_bench, after: .*result\.json"):
        fit(module, [callback], max_steps=3)
    assert len(module.seen) == 2 * 3 and "step_000001 is left out: " in caplog.text
    assert (home / "step_000002/result.json").is_file()


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
        (MIGBench, "prompts_per_batch", 0),
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

    with pytest.raises(UserError, match="benchmark images"):
        fit(Unbuildable(str(tiny_model_dir), FakeEngine(half_right)), [MIGBench(str(bench[0]), str(tmp_path))])


def test_a_real_model_is_evaluated_greedily_and_the_same_twice(bench, encoder, tiny_model_dir) -> None:
    questions = mig_bench.load_files(*bench)
    policy, samples = QwenVL(str(tiny_model_dir)), questions.samples[::4]

    def answers(prompts_per_batch: int) -> dict[str, tuple[str, int]]:
        predictor = PolicyPredictor(policy, NativeEngine(policy), encoder, Decoding(6, prompts_per_batch))
        return {s.id: (reply.text, reply.num_tokens) for s, reply in predictor.answers(samples, questions.load)}

    first = answers(2)
    assert len(first) == 3 and all(0 < num_tokens <= 6 for _, num_tokens in first.values())
    assert answers(1) == first


def letter_b(item, k: int) -> str:
    return "<think>I see.</think><answer>The answer is B</answer>"


def test_any_benchmark_can_be_measured_inside_training(fit, tiny_model_dir, tmp_path: Path) -> None:
    write_replica("blink", tmp_path, count=2)  # 14 questions
    module = FakeModule(str(tiny_model_dir), FakeEngine(letter_b))
    callback = BenchmarkEvaluation("blink", str(tmp_path), after=True, every_n_steps=1, limit=1)
    logger = CSVLogger(tmp_path / "log")
    fit(module, [callback], max_steps=2, logger=logger, log_every_n_steps=1)
    home = tmp_path / "run/blink"
    counts = {path.parent.name: json.loads(path.read_text())["n"] for path in home.glob("*/result.json")}
    assert counts == {"step_000001": 7, "after": 14}
    result = json.loads((home / "after/result.json").read_text())
    logged = [row["blink_val/avg"] for row in read_rows(logger) if row["blink_val/avg"]]
    assert float(logged[-1]) == result["averages"]["avg"]["score"] > 0 and len(logged) == 2
    with pytest.raises(ValueError, match=r"benchmark='blnk' must be one of 'mig_bench', 'ref_l4', .*'mmiu'"):
        BenchmarkEvaluation("blnk", str(tmp_path))


def test_two_ranks_share_the_questions_and_write_what_one_writes(bench, fit, tiny_model_dir, tmp_path: Path) -> None:
    def run(folder: Path, **how) -> FakeEngine:
        engine = FakeEngine(half_right)
        # Chunks of four of the twelve questions before training, of one question inside it.
        often = {"before": True, "every_n_steps": 1, "validation_limit_per_task": 2, "prompts_per_batch": 1}
        callback = MIGBench(str(bench[0]), str(bench[1]), **often, folder=str(folder))
        fit(FakeModule(str(tiny_model_dir), engine), [callback], max_steps=1, **how)
        return engine

    asked = run_ranks(2, lambda: run(tmp_path / "two", strategy="ddp", devices=2).asked)
    assert [len(names) for names in asked] == [8 + 3, 4 + 3]
    for start, end in ((0, 4), (-3, None)):
        assert set(asked[0][start:end]).isdisjoint(asked[1][start:end])
    run(tmp_path / "one")
    for name in ("result.json", "predictions.jsonl"):
        assert (tmp_path / "two/before" / name).read_text() == (tmp_path / "one/before" / name).read_text()
    (inside,) = (tmp_path / "two").glob("step_*/result.json")
    assert json.loads(inside.read_text())["n"] == 6


def test_a_resumed_run_does_not_evaluate_the_start_whenever_its_checkpoint_is_loaded(
    bench, fit, tiny_model_dir, tmp_path: Path
) -> None:
    """Sharded strategies load the checkpoint after `on_fit_start`."""
    callback = MIGBench(str(bench[0]), str(bench[1]), before=True)
    module = FakeModule(str(tiny_model_dir), FakeEngine(half_right))
    trainer = fit(module, [callback])
    result = tmp_path / "run/mig_bench/before/result.json"
    assert result.is_file()
    result.unlink()
    trainer.ckpt_path = str(tmp_path / "any.ckpt")
    callback.on_fit_start(trainer, module)
    assert not result.exists()
