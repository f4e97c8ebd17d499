"""When checkpoints are written, and that they are whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from callbacks.checkpoints import WholeCheckpoints, WindowCheckpoint
from tests.callbacks.conftest import TWO_EPOCHS, FakeEngine, FakeModule, Windows, resuming, true_answer


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


@resuming
def test_checkpoints_come_at_the_first_windows_end_behind_a_multiple(fit, tiny_model_dir, tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Path | None = None) -> list[str]:
        checkpoints = WindowCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=4)
        module = Windows(str(tiny_model_dir), num_updates=3)
        fit(module, [checkpoints], ckpt_path=ckpt_path, enable_checkpointing=True, **TWO_EPOCHS)
        return sorted(file.name for file in (tmp_path / folder).iterdir())

    # The windows end behind update 3, 6, 9, 12 and 15, which pass 4, 8 and 12.
    assert run("whole") == ["step=12.ckpt", "step=6.ckpt", "step=9.ckpt"]
    state = torch.load(tmp_path / "whole/step=9.ckpt", weights_only=True)
    assert (
        state["policy_module"]["num_batches"]
        == state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        == 12
    )
    with pytest.warns(UserWarning, match="dirpath has changed"):
        assert run("resumed", tmp_path / "whole/step=9.ckpt") == ["step=12.ckpt"]
