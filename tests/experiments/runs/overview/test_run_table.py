"""The table of all runs, and the clean-up that asks."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from datamodules.persistence import folder_lock
from datamodules.persistence.files import write_json
from experiments.runs.overview import run_table

DAYS = 24 * 3600


def make_run(folder: Path, is_done: bool = True, average: float | None = None, **checkpoint: object) -> Path:
    """A phase folder as training leaves it, with three checkpoints."""
    (folder / "merged").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    for step in (10, 20, 30):
        (folder / f"checkpoints/step-{step:08d}.ckpt").write_bytes(bytes(1000 * step))
    (folder / "merged/model.safetensors").write_bytes(bytes(5000))
    callbacks = [{"class_path": "callbacks.checkpoints.WindowCheckpoint", "init_args": checkpoint}]
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    write_json(folder / "started.json", {"key": "0123abcd456789ef", "commit": "abc1234"})
    if is_done:
        write_json(folder / "done.json", {"key": "0123abcd456789ef"})
    if average is not None:
        write_result(folder / "benchmarks/mig_bench", average)
    return folder


def write_result(folder: Path, average: float, limit: int | None = None) -> None:
    folder.mkdir(parents=True)
    result = {"version": 2, "limit": limit, "n": 40, "averages": {"avg": {"score": average}}}
    write_json(folder / "result.json", result)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Every state that a run may have."""
    outputs = tmp_path / "outputs"
    write_result(outputs / "nano/base/benchmarks/mig_bench", 2.0)
    make_run(outputs / "nano/cot_sft", average=29.5)
    make_run(outputs / "nano/grpo", is_done=False)
    make_run(outputs / "nano/grpo.0123abcd+", average=36.0)
    make_run(outputs / "nano-seed1/cot_sft", keep_every=100)
    write_result(outputs / "nano-seed1/cot_sft/benchmarks/mig_bench-limit4", 0.0, limit=4)
    (outputs / "my-sweep.0123abcd/trial-0").mkdir(parents=True)
    write_json(outputs / "my-sweep.0123abcd/started.json", {"key": "0123abcd456789ef"})
    (outputs / "rejection_sampling/abc").mkdir(parents=True)  # no run
    (outputs / "results.txt").write_text("no folder")
    return outputs


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """answer(text) puts the text on the terminal; None: there is no terminal."""

    def put(text: str | None) -> None:
        typed = io.StringIO(f"{text}\n")
        typed.isatty = lambda: text is not None
        monkeypatch.setattr("sys.stdin", typed)

    return put


def files(outputs: Path) -> set[str]:
    return {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_the_table_has_every_run_with_its_state(outputs: Path, capsys) -> None:
    old = outputs / "nano/cot_sft"
    for path in [*old.rglob("*"), old]:
        os.utime(path, (path.stat().st_mtime - 5 * DAYS,) * 2)
    with folder_lock.locked(outputs / "nano-seed1/cot_sft"):
        run_table.main(["--outputs", str(outputs)])
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["experiment", "phase", "state", "AVG", "commit", "size", "age"]
    rows = [line.split("  ") for line in lines]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[:3] for row in rows] == [
        ["my-sweep.0123abcd", "moved aside", "0 MB"],
        ["nano", "base", "evaluated"],
        ["nano", "cot_sft", "finished"],
        ["nano", "grpo", "interrupted"],
        ["nano", "grpo.0123abcd+", "moved aside"],
        ["nano-seed1", "cot_sft", "running"],
    ]
    assert rows[1][3] == "2.00" and rows[2][3:5] == ["29.50", "abc1234"] and rows[2][-1] == "5 days"
    assert rows[5][3] == "0.00 of 40", "only some questions were asked"
    assert total.startswith("6 runs, ") and "of which 2 moved aside" in total
    assert not (outputs / "nano/.cot_sft.lock").exists(), "looking writes nothing"


def test_nothing_is_deleted_without_an_answer(outputs: Path, answer, capsys) -> None:
    before = files(outputs)
    answer(None)
    with pytest.raises(SystemExit, match=r"nothing was deleted .* no terminal to ask\. Add --yes") as ended:
        run_table.main(["--outputs", str(outputs), "--clean"])
    assert ended.value.code != 0
    listed = capsys.readouterr().out.partition("these may be deleted:")[2]
    for part in ("grpo.0123abcd+  (moved aside)", "my-sweep.0123abcd", "cot_sft/checkpoints/step-00000010.ckpt"):
        assert part in listed
    for text in ("", "n", "what?"):
        answer(text)
        run_table.main(["--outputs", str(outputs), "--clean"])
        assert capsys.readouterr().out.endswith("nothing was deleted\n")
    assert files(outputs) == before


@pytest.mark.parametrize("is_agreed", [True, False])
def test_what_was_listed_is_deleted_and_nothing_else(outputs: Path, answer, capsys, is_agreed: bool) -> None:
    for copy in ("nano.20261130", "nano.old"):  # of the user
        (outputs / copy / "grpo").mkdir(parents=True)
        (outputs / copy / "grpo/notes.txt").write_text("kept")
    before = files(outputs)
    answer(None if is_agreed else "y")
    run_table.main(["--outputs", str(outputs), "--clean", *(["--yes"] if is_agreed else [])])
    gone = {name for name in before if name.startswith(("nano/grpo.0123abcd+", "my-sweep.0123abcd"))}
    gone |= {"nano/cot_sft/checkpoints/step-00000010.ckpt", "nano/cot_sft/checkpoints/step-00000020.ckpt"}
    assert before - files(outputs) == gone, "the newest stays, and so do those of keep_every and of an unfinished run"
    assert not (outputs / "my-sweep.0123abcd").exists()
    answer(None)
    capsys.readouterr()
    run_table.main(["--outputs", str(outputs), "--clean"])
    assert capsys.readouterr().out.endswith("and no finished run has old checkpoints\n")


def test_a_link_and_a_run_without_a_merged_model_keep_their_files(tmp_path: Path, capsys) -> None:
    outputs, elsewhere = tmp_path / "outputs", make_run(tmp_path / "elsewhere")
    (make_run(outputs / "nano/cot_sft") / "merged").rename(tmp_path / "merged")
    (outputs / "nano/grpo.0123abcd").symlink_to(elsewhere)
    run_table.main(["--outputs", str(outputs), "--clean", "--yes"])
    assert "nothing to delete" in capsys.readouterr().out
    assert len(list(elsewhere.glob("checkpoints/*"))) == len(list(outputs.glob("nano/cot_sft/checkpoints/*"))) == 3
