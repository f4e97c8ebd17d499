from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from callbacks import run_progress
from callbacks.run_progress import Progress, metrics_text
from datamodules.persistence.durations import Outlook
from datamodules.persistence.progress_lines import ProgressLines

METRICS = {"train/loss": 0.25, "speed/completion_tokens_per_second": 1840.4, "train/token_accuracy": 0.875}


def trainer_at(step: int, batches: int = 0, **more: object) -> SimpleNamespace:
    """A trainer after `step` updates and `batches` batches."""
    total = SimpleNamespace(completed=batches)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    facts = {"max_epochs": -1, "num_training_batches": float("inf"), "is_global_zero": True} | more
    return SimpleNamespace(global_step=step, callback_metrics=METRICS, fit_loop=loop, **facts)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of the callback. The thread of its lines waits, so that it prints nothing in a test."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(run_progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr(run_progress, "count_updates", lambda *_: 40)
    return now


@pytest.fixture
def progress() -> Iterator[Progress]:
    made = Progress()
    yield made
    made.teardown(None, None, "fit")


MODULE = SimpleNamespace(accumulate=1, updates_per_window=1)


def begin(progress: Progress, step: int = 0) -> None:
    progress.setup(trainer_at(step), MODULE, "fit")
    progress.on_train_start(trainer_at(step), MODULE)


def test_the_line_has_step_metrics_and_the_time_left(clock, progress: Progress, capsys) -> None:
    begin(progress)
    metrics = "loss 0.250, token accuracy 0.875, 1,840 tokens/s"
    assert capsys.readouterr().out == f"step 0 of 40, {metrics}\n"
    clock.seconds += 30
    progress.on_train_batch_end(trainer_at(10), MODULE)
    assert capsys.readouterr().out == "", "lines come by time, not by batch"
    assert progress.line() == f"step 10 of 40, {metrics}, 2 min left"
    clock.seconds += 45
    assert progress.line() == f"step 10 of 40, {metrics}, 45 s left", "during a long batch the time goes on"
    progress.on_train_end(trainer_at(40), MODULE)
    assert capsys.readouterr().out == f"step 40 of 40, {metrics}\n"


def test_before_and_after_training_a_line_says_that_the_process_works(clock, progress: Progress) -> None:
    progress.setup(trainer_at(0), MODULE, "fit")
    clock.seconds += 40
    assert progress.line() == "loading or saving, 40 s since the start"
    progress.on_train_start(trainer_at(0), MODULE)
    assert progress.line().startswith("step 0 of 40")
    progress.on_train_end(trainer_at(40), MODULE)
    assert progress.line().startswith("loading or saving")


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_lines_end_with_the_run(end: str, clock, progress: Progress) -> None:
    begin(progress)
    assert progress._lines in ProgressLines._open
    if end == "teardown":
        progress.teardown(trainer_at(40), MODULE, "fit")
    else:
        progress.on_exception(trainer_at(40), MODULE, KeyboardInterrupt())
    assert progress._lines not in ProgressLines._open


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(clock, progress: Progress) -> None:
    begin(progress, 20)
    clock.seconds += 30
    progress.on_train_batch_end(trainer_at(30), MODULE)
    assert "step 30 of 40" in progress.line() and "30 s left" in progress.line()


def test_batches_may_end_the_run_before_its_updates(clock, progress: Progress) -> None:
    begin(progress)
    ends_sooner = trainer_at(1, batches=15, max_epochs=2, num_training_batches=10)
    assert progress.share_done(ends_sooner) == 0.75


def test_a_stage_of_a_pipeline_says_its_place_and_the_time_of_the_whole(clock, progress: Progress, monkeypatch) -> None:
    outlook = Outlook("4 of 5, grpo: training", time.time(), expected=60.0, later=600.0, evidence=6000.0)
    for name, value in outlook.environment().items():
        monkeypatch.setenv(name, value)
    begin(progress)
    clock.seconds += 60
    progress.on_train_batch_end(trainer_at(20), MODULE)
    assert progress.line().startswith("[4 of 5, grpo: training] step 20 of 40")
    assert "60 s left, of all stages 11 min" in progress.line()


def test_only_the_first_rank_speaks(clock, progress: Progress, capsys) -> None:
    progress.setup(trainer_at(1, is_global_zero=False), MODULE, "fit")
    for event in (progress.on_train_start, progress.on_train_batch_end, progress.on_train_end):
        event(trainer_at(1, is_global_zero=False), MODULE)
    assert capsys.readouterr().out == ""


def test_reward_and_kl_stand_for_grpo() -> None:
    assert metrics_text({"reward/total": 0.8, "grpo/kl": 0.01}) == "reward 0.800, KL 0.0100"


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_seconds=0 must be greater than 0"):
        Progress(every_n_seconds=0)
