from __future__ import annotations

from types import SimpleNamespace

import pytest

from callbacks import run_progress
from callbacks.run_progress import Progress, metrics_text
from datamodules.persistence.durations import LATER_SECONDS, STAGE, in_words

METRICS = {"train/loss": 0.25, "speed/completion_tokens_per_second": 1840.4, "train/token_accuracy": 0.875}


def trainer_at(step: int, batches: int = 0, **more: object) -> SimpleNamespace:
    """A trainer after `step` updates and `batches` batches."""
    total = SimpleNamespace(completed=batches)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    facts = {"max_epochs": -1, "num_training_batches": float("inf"), "is_global_zero": True} | more
    return SimpleNamespace(global_step=step, callback_metrics=METRICS, fit_loop=loop, **facts)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(run_progress.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(run_progress, "count_updates", lambda *_: 40)
    monkeypatch.setattr(run_progress.sys, "stderr", SimpleNamespace(isatty=lambda: False))
    return now


MODULE = SimpleNamespace(accumulate=1, updates_per_window=1)


def test_a_line_comes_after_the_interval_and_not_before(clock, capsys) -> None:
    progress = Progress(every_n_seconds=30)
    progress.on_train_start(trainer_at(0), MODULE)
    assert capsys.readouterr().out == "training: step 0 of 40\n"
    clock.seconds += 29
    progress.on_train_batch_end(trainer_at(9), MODULE)
    assert capsys.readouterr().out == ""
    clock.seconds += 1
    progress.on_train_batch_end(trainer_at(10), MODULE)
    assert capsys.readouterr().out == "step 10 of 40, loss 0.250, token accuracy 0.875, 1,840 tokens/s, 2 min left\n"


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(clock, capsys) -> None:
    progress = Progress()
    progress.on_train_start(trainer_at(20), MODULE)
    clock.seconds += 30
    progress.on_train_batch_end(trainer_at(30), MODULE)
    assert "step 30 of 40" in (said := capsys.readouterr().out) and "30 s left" in said


def test_batches_may_end_the_run_before_its_updates(clock) -> None:
    progress = Progress()
    progress.on_train_start(trainer_at(0), MODULE)
    ends_sooner = trainer_at(1, batches=15, max_epochs=2, num_training_batches=10)
    assert progress.share_done(ends_sooner) == 0.75


def test_a_stage_of_a_pipeline_says_its_place_and_the_time_of_the_whole(clock, capsys, monkeypatch) -> None:
    monkeypatch.setenv(STAGE, "4 of 5, grpo: training")
    monkeypatch.setenv(LATER_SECONDS, "600")
    progress = Progress()
    progress.on_train_start(trainer_at(0), MODULE)
    clock.seconds += 60
    progress.on_train_batch_end(trainer_at(20), MODULE)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("[4 of 5, grpo: training] step 20 of 40") and "60 s left, of all stages 11 min" in line


def test_only_the_first_rank_speaks(clock, capsys) -> None:
    progress = Progress()
    for event in (progress.on_train_start, progress.on_train_batch_end, progress.on_train_end):
        event(trainer_at(1, is_global_zero=False), MODULE)
    assert capsys.readouterr().out == ""


def test_reward_and_kl_stand_for_grpo() -> None:
    assert metrics_text({"reward/total": 0.8, "grpo/kl": 0.01}) == "reward 0.800, KL 0.0100"


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (89.4, "89 s"), (740, "12 min"), (11100, "3 h 05 min")])
def test_durations_are_written_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_seconds=0 must be greater than 0"):
        Progress(every_n_seconds=0)
