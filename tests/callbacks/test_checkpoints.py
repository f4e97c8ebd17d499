"""When checkpoints are written, which are kept, and that they are whole."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoints import INTERRUPTED, RunStopped, WholeCheckpoints, WindowCheckpoint, newest
from tests.callbacks.conftest import TWO_EPOCHS, FakeEngine, FakeModule, Windows, true_answer
from tests.conftest import SmallDisk


@pytest.fixture
def trainer(fit, tiny_model_dir):
    return fit(FakeModule(str(tiny_model_dir), FakeEngine(true_answer)), [], plugins=[WholeCheckpoints()])


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_old_one(trainer, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new folder" / "old.ckpt"
    trainer.save_checkpoint(path)
    old = path.read_bytes()

    def fill_up(checkpoint: dict, file) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(torch, "save", fill_up)
        trainer.save_checkpoint(path)
    assert path.read_bytes() == old
    assert list(path.parent.glob("*.ckpt")) == [path], "a resume looks for these"

    trainer.save_checkpoint(path)
    assert [file.name for file in path.parent.iterdir()] == ["old.ckpt"]
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_a_checkpoint_does_not_go_through_the_folder_for_temporary_files(trainer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is no such folder"))
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    assert (tmp_path / "new.ckpt").is_file()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_checkpoints_come_at_the_first_windows_end_behind_a_multiple(fit, tiny_model_dir, tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Path | None = None) -> list[str]:
        checkpoints = WindowCheckpoint(str(tmp_path / folder), every_n_steps=4, keep_last=9)
        module = Windows(str(tiny_model_dir), num_updates=3)
        fit(module, [checkpoints], ckpt_path=ckpt_path, enable_checkpointing=True, **TWO_EPOCHS)
        return names(tmp_path / folder)

    # The windows end behind update 3, 6, 9, 12 and 15, which pass 4, 8 and 12; 15 is the end.
    assert run("whole") == [f"step-000000{step}.ckpt" for step in ("06", "09", "12", "15")]
    state = torch.load(tmp_path / "whole/step-00000009.ckpt", weights_only=True)
    assert (
        state["policy_module"]["num_batches"]
        == state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        == 12
    )
    assert run("resumed", tmp_path / "whole/step-00000009.ckpt") == ["step-00000012.ckpt", "step-00000015.ckpt"]


def test_the_checkpoint_of_the_end_trains_no_further(fit, tiny_model_dir, tmp_path: Path) -> None:
    checkpoints = WindowCheckpoint(str(tmp_path / "ckpt"), every_n_steps=1000)
    given = TWO_EPOCHS | {"enable_checkpointing": True}
    fit(Windows(str(tiny_model_dir)), [checkpoints], **given)
    resumed = Windows(str(tiny_model_dir))
    trainer = fit(resumed, [checkpoints], ckpt_path=tmp_path / "ckpt/step-00000005.ckpt", **given)
    assert resumed.seen == [] and trainer.global_step == 5 and trainer.current_epoch == 2


class Clock(Callback):
    """One second for each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def on_train_batch_start(self, *_) -> None:
        self.now += 1.0


def test_a_time_that_is_up_inside_a_window_waits_for_its_end(fit, tiny_model_dir, tmp_path: Path, monkeypatch) -> None:
    # 20 batches in windows of 4: 6 seconds are up at batch 6, and again 6 behind batch 8 and 16.
    checkpoints = WindowCheckpoint(str(tmp_path / "ckpt"), every_n_minutes=0.1, keep_last=9)
    fit(Windows(str(tiny_model_dir)), [Clock(monkeypatch), checkpoints], enable_checkpointing=True, **TWO_EPOCHS)
    found = [torch.load(file, weights_only=True) for file in sorted((tmp_path / "ckpt").iterdir())]
    assert [state["policy_module"]["num_batches"] for state in found] == [8, 16, 20]


class Scores(Callback):
    """Logs a metric, by update."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        pl_module.log("score", self.values.get(trainer.global_step, 0.0))


def test_the_newest_every_kth_and_the_best_are_kept(fit, tiny_model_dir, tmp_path: Path) -> None:
    def run(steps: int, ckpt_path: Path | None = None) -> list[int]:
        keep = {"keep_last": 2, "keep_every": 4, "monitor": "score", "keep_best": 2}
        checkpoints = WindowCheckpoint(str(tmp_path / "ckpt"), every_n_steps=1, **keep)
        module = FakeModule(str(tiny_model_dir), FakeEngine(true_answer))
        callbacks = [Scores({2: 5.0, 3: 4.0, 6: 9.0}), checkpoints]
        fit(module, callbacks, max_steps=steps, ckpt_path=ckpt_path, enable_checkpointing=True)
        return [int(name[5:13]) for name in names(tmp_path / "ckpt")]

    assert run(5) == [2, 3, 4, 5]
    assert run(10, tmp_path / "ckpt/step-00000005.ckpt") == [2, 4, 6, 8, 9, 10], "3 was the second best until 6 came"


def test_a_score_that_is_no_number_is_not_the_best(fit, tiny_model_dir, tmp_path: Path) -> None:
    checkpoints = WindowCheckpoint(str(tmp_path / "ckpt"), every_n_steps=1, monitor="score")
    module = FakeModule(str(tiny_model_dir), FakeEngine(true_answer))
    scores = {1: math.nan, 2: 5.0, 3: math.nan, 4: 1.0}
    fit(module, [Scores(scores), checkpoints], max_steps=6, enable_checkpointing=True)
    assert names(tmp_path / "ckpt") == ["step-00000002.ckpt", "step-00000006.ckpt"]


def test_a_monitor_that_is_not_logged_is_warned_of_once(fit, tiny_model_dir, tmp_path: Path, caplog) -> None:
    checkpoints = WindowCheckpoint(str(tmp_path / "ckpt"), every_n_steps=1, monitor="scores")
    module = FakeModule(str(tiny_model_dir), FakeEngine(true_answer))
    fit(module, [Scores({1: 5.0}), checkpoints], max_steps=3, enable_checkpointing=True)
    assert names(tmp_path / "ckpt") == ["step-00000003.ckpt"]
    assert caplog.text.count("monitor='scores'") == 1 and "score" in caplog.text


def test_the_newest_is_that_of_the_most_updates_whatever_the_clock_says(trainer, tmp_path: Path) -> None:
    for number, step in enumerate((9, 10, 1)):  # the clock went back, or the folder was copied
        trainer.save_checkpoint(tmp_path / f"step-{step:08d}.ckpt")
        os.utime(tmp_path / f"step-{step:08d}.ckpt", (1000 - number, 1000 - number))
    trainer.save_checkpoint(tmp_path / "interrupted.ckpt")  # of update 2
    assert newest(tmp_path).name == "step-00000010.ckpt"
    assert newest(tmp_path, without=["step-00000010.ckpt", "step-00000009.ckpt"]).name == "interrupted.ckpt"
    assert newest(tmp_path / "none") is None


def test_a_draft_that_a_kill_has_left_is_removed(fit, tiny_model_dir, tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/step-00000007.ckpt.unfinished").write_bytes(b"half")
    module = FakeModule(str(tiny_model_dir), FakeEngine(true_answer))
    fit(module, [WindowCheckpoint(str(tmp_path / "ckpt"), every_n_steps=1)], enable_checkpointing=True)
    assert names(tmp_path / "ckpt") == ["step-00000002.ckpt"]


class AtBatch(Callback):
    """Calls something when that many batches are trained on; before checkpoints, which Lightning calls last."""

    def __init__(self, **calls) -> None:
        self.calls, self.number = {int(name[1:]): call for name, call in calls.items()}, 0

    def on_train_batch_end(self, *_) -> None:
        self.number += 1
        self.calls.get(self.number, lambda: None)()


@pytest.fixture
def train_on(fit, tiny_model_dir, small_disk: SmallDisk, caplog):
    """Trains with a checkpoint at each step in the small filesystem, and returns the module and what was warned of."""

    def run(calls: AtBatch, **settings) -> tuple[FakeModule, list[str]]:
        module = FakeModule(str(tiny_model_dir), FakeEngine(true_answer))
        checkpoints = WindowCheckpoint(str(small_disk.root / "run/ckpt"), every_n_steps=1, **settings)
        (small_disk.root / "run").mkdir(exist_ok=True)
        with caplog.at_level(logging.WARNING, "callbacks.checkpoints"):
            plugins = [WholeCheckpoints()]
            fit(module, [calls, checkpoints], max_steps=6, plugins=plugins, enable_checkpointing=True)
        return module, [record.message for record in caplog.records]

    return run


def test_on_a_full_disk_the_older_checkpoint_stays_and_training_goes_on(train_on, small_disk: SmallDisk) -> None:
    calls = AtBatch(_3=lambda: small_disk.fill(but=1024), _5=small_disk.make_room)
    held = []
    calls.calls[5] = lambda: (held.extend(names(small_disk.root / "run/ckpt")), small_disk.make_room())
    module, warnings = train_on(calls)
    assert len(module.seen) == 2 * 6
    assert held == ["step-00000002.ckpt"], "no draft takes what room is left"
    assert len(warnings) == 2
    assert "step-00000003.ckpt" in warnings[0] and "0.0 MiB free" in warnings[0]
    assert names(small_disk.root / "run/ckpt") == ["step-00000006.ckpt"]


def test_a_run_whose_checkpoints_keep_failing_ends_and_says_why(train_on, small_disk: SmallDisk) -> None:
    with pytest.raises(RunStopped, match=r"step 5: 3 checkpoints in a row.*No space left.*step-00000002.ckpt"):
        train_on(AtBatch(_3=small_disk.fill))
    assert torch.load(small_disk.root / "run/ckpt/step-00000002.ckpt", weights_only=True)["global_step"] == 2


def test_into_the_place_that_a_lost_filesystem_left_nothing_is_written(train_on, small_disk: SmallDisk) -> None:
    with pytest.raises(RunStopped, match="3 checkpoints in a row"):
        train_on(AtBatch(_3=small_disk.lose))
    assert list(small_disk.root.iterdir()) == []


def test_a_folder_that_has_become_a_file_is_named(train_on, small_disk: SmallDisk) -> None:
    folder = small_disk.root / "run/ckpt"
    with pytest.raises(RunStopped, match=f"{folder}.*cannot be written|cannot be written.*{folder}"):
        train_on(AtBatch(_3=lambda: (folder.rename(small_disk.root / "aside"), folder.write_text(""))), max_failures=1)


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=0.*keep_last=0.*mode='most'"):
        WindowCheckpoint(every_n_steps=0, keep_last=0, mode="most")


def test_a_checkpoint_replaces_that_of_an_interruption_with_as_many_updates(
    fit, tiny_model_dir, tmp_path: Path
) -> None:
    """Windows in which nothing is learnt have no update: the newer checkpoint has the same number of updates."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    torch.save({"global_step": 4}, folder / INTERRUPTED)
    fit(
        FakeModule(str(tiny_model_dir), FakeEngine(true_answer)),
        [WindowCheckpoint(str(folder), every_n_steps=4)],
        max_steps=4,
        enable_checkpointing=True,
    )
    assert names(folder) == ["step-00000004.ckpt"]
