from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments import phases

ROOT = Path(__file__).resolve().parents[2]


def test_a_phase_is_done_only_with_its_own_hash(tmp_path: Path) -> None:
    folder = tmp_path / "cot_sft"
    assert not phases.claim(folder, "aaaa")
    assert not phases.claim(folder, "aaaa"), "started is not done"
    phases.write_marker(folder, key="aaaa", seconds=1.0)
    assert phases.claim(folder, "aaaa")


def test_other_settings_start_afresh_and_lose_nothing(tmp_path: Path) -> None:
    folder, said = tmp_path / "grpo", []
    for key in ("aaaa", "bbbb", "aaaa", "bbbb", "aaaa"):
        assert not phases.claim(folder, key, said.append)
        assert not (folder / "weights").exists()
        (folder / "weights").write_text(key)
    kept = sorted((path.name, (path / "weights").read_text()) for path in tmp_path.iterdir())
    assert kept == [
        ("grpo", "aaaa"), ("grpo.aaaa", "aaaa"), ("grpo.aaaa+", "aaaa"), ("grpo.bbbb", "bbbb"), ("grpo.bbbb+", "bbbb"),
    ]  # fmt: skip
    assert len(said) == 4 and "grpo.aaaa" in said[0]


def test_other_ranks_learn_that_the_run_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "grpo"
    phases.claim(folder, "aaaa")
    assert phases.wait_for_claim(folder, "aaaa", seconds=1) is False
    phases.write_marker(folder, key="aaaa")
    assert phases.wait_for_claim(folder, "aaaa", seconds=1) is True
    phases.claim(folder, "bbbb")
    assert phases.wait_for_claim(folder, "bbbb", seconds=1) is False
    with pytest.raises(TimeoutError, match="aaaa"):
        phases.wait_for_claim(folder, "aaaa", seconds=0)


def test_a_second_process_waits_for_the_first_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from experiments import phases\n"
        "with phases.locked(sys.argv[1]): print('in', flush=True); time.sleep(60)"
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
        with phases.locked(tmp_path / "grpo", kill_and_note):
            assert len(said) == 1 and "waiting" in said[0]
        assert time.monotonic() - start < 30
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_place_that_cannot_be_written_ends_the_program_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file where a folder should be")
    wanted = r"outputs/nano/grpo cannot be written: .*[Nn]ot a directory"
    with pytest.raises(SystemExit, match=wanted), phases.locked(tmp_path / "outputs/nano/grpo"):
        pass


def test_a_lock_that_is_not_waited_for_says_whether_it_is_held(tmp_path: Path) -> None:
    with phases.locked(tmp_path / "grpo", wait=False) as first, phases.locked(tmp_path / "grpo", wait=False) as second:
        assert first and not second
    with phases.locked(tmp_path / "grpo") as third:
        assert third


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        ({"data": {"style": "think"}}, "it has no field data.convention"),
        ({"model": {}}, "it has no field data.convention"),
        ({"data": {"style": "long", "convention": "absolute"}}, r"data.style='long' is none of \['think', "),
        (None, "no settings by name, but None"),
    ],
)
def test_settings_of_another_version_are_told_with_file_and_field(tmp_path: Path, saved: object, what: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    file = re.escape(str(tmp_path / "config.yaml"))
    with pytest.raises(ValueError, match=f"{file} was written by another version of the project: {what}"):
        phases.trained_form(str(tmp_path / "merged"), {"convention": "absolute", "style": "think"})
