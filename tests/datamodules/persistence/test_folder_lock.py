from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.persistence import folder_lock

ROOT = Path(__file__).resolve().parents[3]


def test_a_second_process_waits_for_the_first_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from datamodules.persistence import folder_lock\n"
        "with folder_lock.locked(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "grpo")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "in\n"
        said: list[str] = []

        def kill_and_note(message: str) -> None:
            said.append(message)
            holder.kill()

        start = time.monotonic()
        with folder_lock.locked(tmp_path / "grpo", kill_and_note):
            assert len(said) == 1 and "waiting" in said[0]
        assert time.monotonic() - start < 30
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_place_that_cannot_be_written_ends_the_program_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file where a folder should be")
    wanted = r"outputs/nano/grpo cannot be written: .*[Nn]ot a directory"
    with pytest.raises(SystemExit, match=wanted), folder_lock.locked(tmp_path / "outputs/nano/grpo"):
        pass


def test_a_lock_that_is_not_waited_for_says_whether_it_is_held(tmp_path: Path) -> None:
    with (
        folder_lock.locked(tmp_path / "grpo", wait=False) as first,
        folder_lock.locked(tmp_path / "grpo", wait=False) as second,
    ):
        assert first and not second
    with folder_lock.locked(tmp_path / "grpo") as third:
        assert third
