"""The guard for collapse, on a module whose metrics are written in the test."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import collapse_guard
from callbacks.checkpoints import RunStopped, WindowCheckpoint
from callbacks.collapse_guard import Bound, CollapseGuard, RolledBack
from callbacks.save_on_interrupt import SaveOnInterrupt
from datamodules.persistence.files import read_json, write_json
from tests.callbacks.conftest import Windows
from tests.callbacks.test_fit_callbacks import Sends

# Update 7 and later are out of bounds, until the guard has rolled back.
HEALTHY, SPOILT = 1.0, 0.1


class Rewarded(Windows):
    """Trains with every batch (windows of `accumulate`), and logs a reward that falls, or is given for each update;
    notes what it did, by update."""

    def __init__(
        self,
        path: str,
        falls_at: int = 7,
        accumulate: int = 1,
        always: bool = False,
        rewards: Sequence[float] | None = None,
    ) -> None:
        super().__init__(path)
        self.falls_at, self.accumulate, self.always, self.rewards = falls_at, accumulate, always, rewards
        self.rates: list[float] = []
        self.shown_rates: list[tuple[float, float]] = []  # of each update: in use, and as it is logged
        self.seeds: list[int] = []
        self.base_seed = self.seed

    def training_step(self, batch, batch_idx: int) -> None:
        in_use = self.optimizers().param_groups[0]["lr"]
        self.shown_rates.append((in_use, self.lr_schedulers().get_last_lr()[0]))
        super().training_step(batch, batch_idx)
        falls = self.global_step >= self.falls_at and (self.always or self.seed == self.base_seed)
        given = self.rewards[self.global_step - 1] if self.rewards else None
        self.log_step({"reward/total": given or (SPOILT if falls else HEALTHY)})
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.seeds.append(self.batch_seed(self.num_batches))


@pytest.fixture
def run(fit, tiny_model_dir, tmp_path: Path):
    """run(action, ...) trains in tmp_path/run as experiments.train does, from the last good checkpoint; the module."""

    def train(action: str, bound: Bound | None = None, max_steps: int = 12, **settings) -> Rewarded:
        factor = settings.pop("learning_rate_factor", 1.0)
        bounds = {settings.pop("metric", "reward/total"): bound or Bound(low=0.5)}
        guard = CollapseGuard(bounds, action, average_over=4, learning_rate_factor=factor)
        more = settings.pop("callbacks", ())
        logger = settings.pop("logger", False)
        checkpoints = WindowCheckpoint(every_n_steps=settings.pop("every_n_steps", 2), keep_last=9)
        module = Rewarded(str(tiny_model_dir), **settings)
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        collapse_guard.finish_rollback(folder)
        given = {
            "enable_checkpointing": True,
            "max_epochs": 5,
            "ckpt_path": collapse_guard.last_good(folder),
            "logger": logger,
            "log_every_n_steps": 1,
        }
        fit(module, [guard, checkpoints, *more], max_steps=max_steps, **given)
        return module

    return train


def run_to_the_end(run, folder: Path, **settings) -> Rewarded:
    """Starts again after each rollback, as experiments.train does."""
    for _ in range(4):
        try:
            return run("roll_back", **settings)
        except RolledBack:
            assert read_json(folder / "run/collapse.json")["spoilt"]
    pytest.fail("it is rolled back again and again")


def events(folder: Path) -> list[dict]:
    return read_json(folder / "run/collapse.json").get("events", [])


def weights(module: Rewarded) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.policy.trainable_parameters()]


def test_a_warning_is_given_once_and_training_goes_on(run, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, "callbacks.collapse_guard"):
        module = run("warn")
    assert module.global_step == 12
    (warning,) = [record.message for record in caplog.records if record.name == "callbacks.collapse_guard"]
    # The mean of four batches: 0.55 at update 8, 0.325 at update 9.
    assert warning == "collapse at step 9: reward/total: the mean 0.325 over the last 4 batches is below low=0.5"
    assert [(event["action"], event["step"]) for event in events(tmp_path)] == [("warn", 9)]


@pytest.mark.parametrize(("action", "level"), [("warn", "WARN"), ("stop", "ERROR")])
def test_wandb_gets_an_alert(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, level: str) -> None:
    alerts: list[dict[str, str]] = []
    wandb.finish()  # a run that an earlier test in this process left open would be taken for the new one
    logger = WandbLogger(name="tiny/grpo", save_dir=tmp_path, offline=True)
    monkeypatch.setattr(wandb.Run, "alert", lambda run, **words: alerts.append(words))
    try:
        with pytest.raises(RunStopped) if action == "stop" else nullcontext():
            run(action, logger=logger)
    finally:
        wandb.finish()
    (alert,) = alerts
    assert alert["level"] == level and alert["title"] == f"tiny/grpo: collapse, {action}"
    assert "reward/total" in alert["text"] and "low=0.5" in alert["text"]


def test_a_warning_that_cannot_be_written_down_does_not_end_the_run(run, tmp_path: Path, caplog) -> None:
    (tmp_path / "run/collapse.json").mkdir(parents=True)  # no file
    with caplog.at_level(logging.WARNING, "callbacks.collapse_guard"):
        assert run("warn").global_step == 12
    assert "is below low=0.5" in caplog.text and "cannot be written" in caplog.text
    with pytest.raises(OSError, match="cannot be written"):
        run("stop", max_steps=24)


def test_a_stop_names_metric_value_bound_and_the_last_good_checkpoint(run, tmp_path: Path) -> None:
    words = r"step 9: reward/total: the mean 0.325 .* low=0.5. The last good checkpoint is .*step-00000004.ckpt"
    with pytest.raises(RunStopped, match=words):
        run("stop")
    with pytest.raises(RunStopped, match=words):
        run("stop")
    assert len(events(tmp_path)) == 1, "the same stop, seen again by a run that went on, is one event"


def test_a_share_below_the_best_so_far_is_a_fall(run) -> None:
    with pytest.raises(RunStopped, match=r"the mean 0.55 .* more than max_drop=0.4 below its best, 1"):
        run("stop", bound=Bound(max_drop=0.4))


def test_nothing_happens_inside_the_bounds(run, tmp_path: Path) -> None:
    assert run("stop", falls_at=99).global_step == 12
    assert events(tmp_path) == []


def test_a_rollback_goes_on_from_before_the_average(run, tmp_path: Path) -> None:
    with pytest.raises(RolledBack, match=r"Rolled back to .*step-00000004.ckpt; rollback 1 of 2"):
        run("roll_back")
    module = run("roll_back")
    assert module.global_step == 12 and len(module.seen) == 2 * 8
    (event,) = events(tmp_path)
    assert (event["action"], event["step"], event["checkpoint"]) == ("roll_back", 9, "step-00000004.ckpt")
    state = torch.load(tmp_path / "run/checkpoints/step-00000012.ckpt", weights_only=True)
    (guard,) = [value for name, value in state["callbacks"].items() if name.startswith("CollapseGuard")]
    assert guard["rollbacks"] == 1


def test_after_a_rollback_samples_rollouts_and_rate_differ(run, tmp_path: Path) -> None:
    undisturbed = run("stop", falls_at=99)
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.unlink()
    with pytest.raises(RolledBack):
        run("roll_back", learning_rate_factor=0.5)
    module = run("roll_back", learning_rate_factor=0.5)
    assert module.seen != undisturbed.seen[2 * 4 :]
    assert not set(module.seeds) & set(undisturbed.seeds)
    assert module.rates == pytest.approx([rate / 2 for rate in undisturbed.rates[4:]])
    assert all(shown == in_use for in_use, shown in module.shown_rates)


def test_rollbacks_are_bounded(run, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="stopped after 2 rollbacks: collapse at step 9"):
        run_to_the_end(run, tmp_path, always=True)
    assert [event["action"] for event in events(tmp_path)] == ["roll_back", "roll_back", "stop"]


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(run, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="The last good checkpoint is None"):
        run("roll_back", falls_at=0, every_n_steps=100)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["before the decision is recorded", "before spoilt checkpoints are gone", "later"])
def test_a_kill_inside_a_rollback_changes_nothing(run, tmp_path: Path, monkeypatch, where: str) -> None:
    whole = weights(run_to_the_end(run, tmp_path, learning_rate_factor=0.5))
    (tmp_path / "run").rename(tmp_path / "whole")

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if where == "before the decision is recorded":
            patch.setattr(collapse_guard, "_record", die)
        elif where == "before spoilt checkpoints are gone":
            patch.setattr(collapse_guard, "write_json", lambda *a, write=collapse_guard.write_json: (write(*a), die()))
        else:
            log_step = Rewarded.log_step

            def die_after_the_rollback(self: Rewarded, metrics: dict) -> None:
                log_step(self, metrics)
                if self.global_step == 9 and self.seed != self.base_seed:
                    die()

            patch.setattr(Rewarded, "log_step", die_after_the_rollback)
        with pytest.raises(Killed):
            run_to_the_end(run, tmp_path, learning_rate_factor=0.5)
    again = weights(run_to_the_end(run, tmp_path, learning_rate_factor=0.5))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    first, second = (read_json(tmp_path / name / "collapse.json")["events"] for name in ("whole", "run"))
    assert first == second


def test_the_batches_of_an_open_window_are_not_in_the_state(run, tmp_path: Path) -> None:
    run("stop", falls_at=99, accumulate=4, max_steps=3)
    state = torch.load(tmp_path / "run/checkpoints/step-00000003.ckpt", weights_only=True)
    (guard,) = [value for name, value in state["callbacks"].items() if name.startswith("CollapseGuard")]
    assert guard["values"] == [{"step": step, "reward/total": HEALTHY} for step in (2, 2, 2, 3)]


def test_what_an_interruption_saved_inside_the_window_is_spoilt_too(run, tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        run("roll_back", callbacks=[SaveOnInterrupt(), Sends(signal.SIGTERM, batch=8)])
    assert collapse_guard.last_good(tmp_path / "run").name == "interrupted.ckpt"
    with pytest.raises(RolledBack, match=r"step-00000004\.ckpt"):
        run("roll_back")
    assert collapse_guard.last_good(tmp_path / "run").name == "step-00000004.ckpt"
    collapse_guard.finish_rollback(tmp_path / "run")
    assert collapse_guard.last_good(tmp_path / "run").name == "step-00000004.ckpt"


def test_a_spoilt_checkpoint_that_cannot_be_removed_stays_condemned(tmp_path: Path) -> None:
    spoilt = tmp_path / "checkpoints/step-00000008.ckpt"
    spoilt.mkdir(parents=True)  # no file: it cannot be unlinked
    write_json(tmp_path / "collapse.json", {"events": [], "spoilt": [spoilt.name]})
    with pytest.raises(OSError, match=r"step-00000008\.ckpt"):
        collapse_guard.finish_rollback(tmp_path)
    assert collapse_guard.last_good(tmp_path) is None


def test_a_value_that_is_no_number_is_a_fault_and_does_not_lower_the_best(run, tmp_path: Path) -> None:
    run("warn", bound=Bound(max_drop=0.4), max_steps=13, rewards=[1.0] * 4 + [math.nan] + [0.72] * 4 + [0.5] * 4)
    first, second = events(tmp_path)
    assert first["step"] == 5 and "nan" in first["fault"]
    assert second["step"] == 12 and second["fault"].endswith("below its best, 1")


def test_a_second_metric_is_watched_while_the_first_is_out_of_its_bounds(fit, tiny_model_dir, tmp_path: Path) -> None:
    class Two(Rewarded):
        def training_step(self, batch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log_step({"grpo/entropy": ([1.0] * 4 + [10.0] * 4 + [4.0] * 4)[self.global_step - 1]})

    guard = CollapseGuard({"reward/total": Bound(low=2.0), "grpo/entropy": Bound(max_drop=0.4)}, "warn", average_over=4)
    (tmp_path / "run").mkdir()
    fit(Two(str(tiny_model_dir)), [guard], max_steps=12, max_epochs=5)
    # The entropy's mean was 10 at update 8, and is 5.5 at update 11.
    left = [(event["metric"], event["step"]) for event in events(tmp_path)]
    assert left == [("reward/total", 4), ("grpo/entropy", 11)]


def test_a_share_of_a_negative_best_is_below_it() -> None:
    bound = Bound(max_drop=0.5)
    assert bound.fault(-1.0, best=-1.0) is None and bound.fault(-1.4, best=-1.0) is None
    assert bound.fault(-1.6, best=-1.0)


def test_a_metric_that_is_never_logged_is_warned_of_once(run, caplog) -> None:
    with caplog.at_level(logging.WARNING, "callbacks.collapse_guard"):
        run("stop", metric="reward/totl", max_steps=8)
    (warning,) = [record.message for record in caplog.records if record.name == "callbacks.collapse_guard"]
    assert "'reward/totl'" in warning and "reward/total" in warning


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"action='cry'.*average_over=0.*'grpo/kl'.* has neither.*max_drop=-1"):
        CollapseGuard({"grpo/kl": Bound(), "reward/total": Bound(max_drop=-1)}, "cry", average_over=0)
