"""Checkpoints as disks leave them: cut short, emptied, with changed bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks import collapse_guard
from callbacks.checkpoints import RunStopped, WindowCheckpoint
from callbacks.sound_checkpoints import damage, newest_whole
from datamodules.persistence.files import write_json


class Runs:
    """Stands for what a poisoned pickle calls."""

    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def write(file: Path, step: int, **more: object) -> Path:
    torch.save({"global_step": step, "state_dict": {"weight": torch.arange(5000.0)}, **more}, file)
    return file


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    """As some filesystems leave a file when the power fails."""
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def overwrite(file: Path) -> None:
    file.write_text("<html>404</html>")


DAMAGES = [cut, empty, zero, flip, overwrite]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (3, 9, 10):
        write(tmp_path / f"step-{step:08d}.ckpt", step)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_newest_whole_one_taken(folder, caplog, spoil) -> None:
    spoil(folder / "step-00000010.ckpt")
    damaged = (folder / "step-00000010.ckpt").read_bytes()
    assert newest_whole(folder).name == "step-00000009.ckpt"
    assert names(folder) == ["step-00000003.ckpt", "step-00000009.ckpt", "step-00000010.ckpt.damaged"]
    assert (folder / "step-00000010.ckpt.damaged").read_bytes() == damaged
    assert "step-00000010.ckpt is damaged" in caplog.text and len(caplog.records) == 1
    assert newest_whole(folder).name == "step-00000009.ckpt" and len(caplog.records) == 1


def test_whole_checkpoints_are_left_as_they_are(folder: Path, caplog) -> None:
    before = names(folder)
    assert newest_whole(folder).name == "step-00000010.ckpt"
    assert newest_whole(folder, without=["step-00000010.ckpt"]).name == "step-00000009.ckpt"
    assert newest_whole(folder / "none") is None
    assert names(folder) == before and not caplog.records


def test_other_ranks_find_the_same_and_rename_nothing(folder: Path) -> None:
    cut(folder / "step-00000010.ckpt")
    before = names(folder)
    assert newest_whole(folder, keep_aside=False).name == "step-00000009.ckpt"
    assert names(folder) == before
    assert newest_whole(folder).name == newest_whole(folder, keep_aside=False).name == "step-00000009.ckpt"


@pytest.mark.parametrize("spoil", DAMAGES)
def test_where_none_is_whole_the_run_does_not_begin_again_unasked(folder: Path, spoil: Callable) -> None:
    for file in folder.iterdir():
        spoil(file)
    before = names(folder)
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"(?s)no checkpoint in .* is whole.*step-00000003.*whole copy.*remove"):
            newest_whole(folder)
    assert names(folder) == before


def test_one_of_an_interruption_is_taken_if_it_is_whole_and_furthest(folder: Path) -> None:
    write(folder / "interrupted.ckpt", 10)
    assert newest_whole(folder).name == "interrupted.ckpt"
    flip(folder / "interrupted.ckpt")
    assert newest_whole(folder).name == "step-00000010.ckpt"
    assert "interrupted.ckpt.damaged" in names(folder)
    write(folder / "interrupted.ckpt", 10)
    cut(folder / "interrupted.ckpt")
    cut(folder / "step-00000010.ckpt")
    assert newest_whole(folder).name == "step-00000009.ckpt"
    assert "interrupted.ckpt.damaged+" in names(folder), "the earlier one is kept too"


def test_what_a_rollback_condemned_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (3, 9):
        write(tmp_path / f"checkpoints/step-{step:08d}.ckpt", step)
    write_json(tmp_path / collapse_guard.FILE_NAME, {"events": [], "spoilt": ["step-00000009.ckpt"]})
    assert collapse_guard.last_whole(tmp_path).name == "step-00000003.ckpt"
    empty(tmp_path / "checkpoints/step-00000003.ckpt")
    with pytest.raises(RunStopped, match=r"step-00000003\.ckpt: it is empty"):
        collapse_guard.last_whole(tmp_path)


def test_no_changed_byte_of_the_weights_goes_unseen(tmp_path: Path) -> None:
    """Where a change is not seen, what is loaded is the same."""
    file = write(tmp_path / "step-00000001.ckpt", 1)
    whole, rng = file.read_bytes(), random.Random(0)
    unseen = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        if damage(file) is None:
            unseen += 1
            loaded = torch.load(file, weights_only=True)
            assert loaded["global_step"] == 1
            assert torch.equal(loaded["state_dict"]["weight"], torch.arange(5000.0))
    assert unseen < 30, "room between the members, and times"
    for length in range(0, len(whole), 997):
        file.write_bytes(whole[:length])
        assert damage(file) is not None


def test_a_pickle_that_would_run_something_is_whole_and_still_refused(folder: Path) -> None:
    write(folder / "step-00000011.ckpt", 11, extra=Runs())
    assert newest_whole(folder).name == "step-00000011.ckpt"
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(folder / "step-00000011.ckpt", weights_only=True)


@pytest.mark.parametrize("first", ["step-00000003.ckpt", None])
def test_a_rank_that_goes_on_from_another_checkpoint_than_the_first_ends(first: str | None) -> None:
    strategy = SimpleNamespace(broadcast=lambda value: first)
    trainer = SimpleNamespace(ckpt_path="checkpoints/step-00000009.ckpt", global_rank=1, strategy=strategy)
    with pytest.raises(RunStopped, match=f"rank 1 goes on from step-00000009.ckpt, the first rank from {first}"):
        WindowCheckpoint("unused", every_n_steps=1).on_train_start(trainer, None)
