from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from datamodules.persistence.files import write_json
from experiments.evaluation.trained_form import trained_form
from experiments.runs import run_identity
from experiments.runs.changes import CodeChanged, MadeOf, OtherRun


def test_a_phase_is_done_only_with_its_own_hash(tmp_path: Path) -> None:
    folder = tmp_path / "cot_sft"
    assert not run_identity.claim(folder, "aaaa")
    assert not run_identity.claim(folder, "aaaa"), "started is not done"
    run_identity.write_marker(folder, key="aaaa", seconds=1.0)
    assert run_identity.claim(folder, "aaaa")


def test_other_settings_start_afresh_and_lose_nothing(tmp_path: Path) -> None:
    folder, said = tmp_path / "grpo", []
    for key in ("aaaa", "bbbb", "aaaa", "bbbb", "aaaa"):
        assert not run_identity.claim(folder, key, said.append)
        assert not (folder / "weights").exists()
        (folder / "weights").write_text(key)
    kept = sorted((path.name, (path / "weights").read_text()) for path in tmp_path.iterdir())
    assert kept == [
        ("grpo", "aaaa"), ("grpo.aaaa", "aaaa"), ("grpo.aaaa+", "aaaa"), ("grpo.bbbb", "bbbb"), ("grpo.bbbb+", "bbbb"),
    ]  # fmt: skip
    assert len(said) == 4 and "grpo.aaaa" in said[0]


def test_other_ranks_learn_that_the_run_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "grpo"
    run_identity.claim(folder, "aaaa")
    assert run_identity.wait_for_claim(folder, "aaaa", seconds=1) is False
    run_identity.write_marker(folder, key="aaaa")
    assert run_identity.wait_for_claim(folder, "aaaa", seconds=1) is True
    run_identity.claim(folder, "bbbb")
    assert run_identity.wait_for_claim(folder, "bbbb", seconds=1) is False
    with pytest.raises(TimeoutError, match="aaaa"):
        run_identity.wait_for_claim(folder, "aaaa", seconds=0)


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        ({"data": {"style": "think"}}, "it has no field data.box_format"),
        ({"model": {}}, "it has no field data.box_format"),
        ({"data": {"style": "long", "box_format": "absolute_pixels"}}, r"data.style='long' is none of \['think', "),
        (None, "no settings by name, but None"),
    ],
)
def test_settings_of_another_version_are_told_with_file_and_field(tmp_path: Path, saved: object, what: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    file = re.escape(str(tmp_path / "config.yaml"))
    with pytest.raises(ValueError, match=f"{file} was written by another version of the project: {what}"):
        trained_form(str(tmp_path / "merged"), {"box_format": "absolute_pixels", "style": "think"})


OLD_CODE, NEW_CODE = {"lightning_modules/grpo.py": "1"}, {"lightning_modules/grpo.py": "2"}


def saved(settings: dict) -> tuple[dict, dict]:
    return settings, {}


def begin(folder: Path, code: dict, choice: str | None = None, key: str = "aaaa", **settings: object) -> bool:
    return run_identity.claim(folder, MadeOf(key, settings, {}, code, saved), choice=choice)


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_what_other_code_has_made_is_asked_about_and_never_taken_or_lost(
    tmp_path: Path, is_done: bool, is_recorded: bool, capsys: pytest.CaptureFixture
) -> None:
    folder, old = tmp_path / "grpo", OLD_CODE if is_recorded else {}
    begin(folder, old)
    (folder / "weights").write_text("old")
    if is_done:
        run_identity.finish(folder, "aaaa", seconds=5.0)
        assert begin(folder, old) is True
    words = r"lightning_modules/grpo\.py" if is_recorded else "an earlier version of the project"
    for _ in range(2):
        with pytest.raises(CodeChanged, match=f"is {'finished' if is_done else 'unfinished'}.*\n.*{words}"):
            begin(folder, NEW_CODE)
        with pytest.raises(CodeChanged):
            run_identity.wait_for_claim(folder, MadeOf("aaaa", {}, {}, NEW_CODE), seconds=1)
    assert begin(folder, NEW_CODE, "keep") is is_done and (folder / "weights").read_text() == "old"
    assert begin(folder, NEW_CODE) is is_done, "it is not asked twice"
    assert run_identity.wait_for_claim(folder, MadeOf("aaaa", {}, {}, NEW_CODE), seconds=1) is is_done
    marker = run_identity.read_marker(folder, run_identity.DONE if is_done else run_identity.STARTED)
    assert marker.get("code", {}) == old, "which code has made it stays written down"
    assert not is_done or marker["seconds"] == 5.0
    with pytest.raises(CodeChanged):
        begin(folder, {"lightning_modules/grpo.py": "3"})
    capsys.readouterr()
    for _ in range(2):  # the same command again goes on with what it has begun
        assert begin(folder, NEW_CODE, "redo") is False
    assert not (folder / "weights").exists() and (tmp_path / "grpo.aaaa/weights").read_text() == "old"
    assert not (tmp_path / "grpo.aaaa+").exists() and "grpo.aaaa" in capsys.readouterr().out
    run_identity.finish(folder, "aaaa")
    assert begin(folder, NEW_CODE) is True and run_identity.read_marker(folder)["code"] == NEW_CODE


def test_a_run_that_is_set_aside_is_named_with_what_differs_and_the_way_back(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "grpo"
    begin(folder, OLD_CODE, model={"init_args": {"beta": 0.1}}, data={"batch_size": 2})
    assert begin(folder, NEW_CODE, key="bbbb", model={"init_args": {"beta": 0.2}}, data={"batch_size": 2}) is False
    said = capsys.readouterr().out
    assert "model.beta: 0.1 -> 0.2" in said and "batch_size" not in said
    (back,) = [line for line in said.splitlines() if line.startswith("to go back")]
    commands = back.partition(": ")[2].partition(", and")[0]
    subprocess.run(commands, shell=True, check=True)
    assert begin(folder, OLD_CODE, model={"init_args": {"beta": 0.1}}, data={"batch_size": 2}) is False
    assert capsys.readouterr().out == "" and (tmp_path / "grpo.new").is_dir()


def test_a_setting_that_a_new_version_has_is_asked_about(tmp_path: Path) -> None:
    folder = tmp_path / "grpo"
    begin(folder, OLD_CODE, data={"batch_size": 2})
    run_identity.finish(folder, "aaaa")
    with pytest.raises(CodeChanged, match=r"only one of the two has: data\.verify"):
        begin(folder, NEW_CODE, key="bbbb", data={"batch_size": 2, "verify": True})
    assert begin(folder, NEW_CODE, "keep", key="bbbb", data={"batch_size": 2, "verify": True}) is True
    assert begin(folder, NEW_CODE, key="bbbb", data={"batch_size": 2, "verify": True}) is True


def test_by_the_same_code_only_lightning_can_have_added_a_setting(tmp_path: Path) -> None:
    old, trainer, folder = {"trainer": {"devices": 1}}, {"trainer": {"devices": 1, "new": None}}, tmp_path / "grpo"
    begin(folder, OLD_CODE, **old)
    assert begin(folder, NEW_CODE, "keep", **old) is False
    for code in (NEW_CODE, OLD_CODE):  # the code for which it was kept is as good as that which has made it
        more = MadeOf("bbbb", old | {"data": {"given": 1}}, {}, code)
        for choice in (None, "keep"):
            with pytest.raises(OtherRun, match="data: only one of the two has it"):
                run_identity.claim(folder, more, choice=choice, cure="name another")
        with pytest.raises(CodeChanged, match=r"only one of the two has: trainer\.new"):
            begin(folder, code, key="cccc", **trainer)


def test_a_run_of_a_version_that_wrote_down_neither_settings_nor_code_is_compared_by_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "grpo"
    run_identity.write_marker(folder, run_identity.STARTED, key="0123456789", commit="abc")
    run_identity.write_marker(folder, key="0123456789", seconds=1.0)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"batch_size": 2}}))
    with pytest.raises(CodeChanged, match="an earlier version of the project"):
        begin(folder, NEW_CODE, data={"batch_size": 2})
    assert begin(folder, NEW_CODE, "keep", data={"batch_size": 2}) is True
    assert begin(folder, NEW_CODE, data={"batch_size": 2}) is True and run_identity.trained_commit(folder) == "abc"
    assert begin(folder, NEW_CODE, key="bbbb", data={"batch_size": 3}) is False
    assert "data.batch_size: 2 -> 3" in capsys.readouterr().out


def test_a_copy_that_a_user_has_named_was_not_moved_aside(tmp_path: Path) -> None:
    run = tmp_path / "grpo"
    write_json(run / run_identity.STARTED, {"key": "0123abcd4567"})
    aside = run_identity.set_aside(run)
    assert aside.name == "grpo.0123abcd" and run_identity.is_aside(aside)
    shutil.copytree(aside, tmp_path / "grpo.20261130")
    (tmp_path / "nano.old/grpo").mkdir(parents=True)
    for name in ("grpo.20261130", "nano.old"):
        assert not run_identity.is_aside(tmp_path / name), name
    early = tmp_path / "sft"  # of a version that wrote no key
    early.mkdir()
    (early / run_identity.CONFIG).write_text("")
    assert run_identity.is_aside(run_identity.set_aside(early))


def test_callbacks_are_read_as_the_training_command_accepts_them() -> None:
    full = {"class_path": "callbacks.a.B", "init_args": {"n": 1}}
    for given, found in (
        ([full], [full]),
        (full, [full]),
        (["callbacks.a.B", full], [{"class_path": "callbacks.a.B"}, full]),
        ("callbacks.a.B", [{"class_path": "callbacks.a.B"}]),
        (None, []),
    ):
        assert run_identity.callback_entries({"trainer": {"callbacks": given}}) == found
    assert run_identity.callback_entries({}) == run_identity.callback_entries({"trainer": None}) == []
