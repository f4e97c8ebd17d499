from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from datamodules.persistence.files import write_json
from experiments.runs.changes import (
    MadeOf,
    choice_of,
    find_differences,
    is_stale,
    kept,
    question,
    spell_out,
    take_choice,
)
from tests.experiments.conftest import ROOT
from tests.outside_make import outside_make

OLD, NEW = {"a.py": "1", "b.py": "2"}, {"a.py": "1", "b.py": "3"}


def test_the_answer_is_taken_from_the_command_line() -> None:
    assert take_choice(["--config", "x", "--keep"]) == ("keep", ["--config", "x"])
    assert take_choice(["--redo", "--redo"]) == ("redo", []) and take_choice(["--keep=true"]) == (None, ["--keep=true"])
    assert spell_out(["--a", "--redo"]) == ["--a", "--redo=true"]
    assert choice_of(redo=True, keep=False) == "redo" and choice_of(redo=False, keep=False) is None
    for both in (lambda: take_choice(["--redo", "--keep"]), lambda: choice_of(redo=True, keep=True)):
        with pytest.raises(SystemExit, match="exclude each other"):
            both()


def test_what_other_code_has_made_is_stale_until_it_is_kept() -> None:
    assert not is_stale({"code": OLD}, OLD) and is_stale({"code": OLD}, NEW)
    assert is_stale({}, NEW), "nobody knows by which code"
    assert not is_stale({}, {}), "who has no code to compare does not ask"
    record = {"code": OLD} | kept({"code": OLD}, NEW)
    assert record["code"] == OLD, "that it was made so stays written down"
    assert not is_stale(record, NEW) and is_stale(record, {"a.py": "4"})
    assert is_stale(record, NEW, "redo") and not is_stale({"code": NEW}, NEW, "redo"), "made again once, not for ever"


def settings(**more: object) -> dict:
    callbacks = [{"class_path": "callbacks.a.Merge", "init_args": {}}]
    callbacks.append({"class_path": "callbacks.b.Bench", "init_args": {"n": 3}})
    model = {"class_path": "m.GRPO", "init_args": {"beta": 0.1, "betas": (0.9, 0.95), "lora": {"rank": 4}}}
    return {"model": model, "trainer": {"max_steps": 5, "callbacks": callbacks}} | more


def test_differences_are_named_by_the_flags_that_set_them() -> None:
    new = settings(seed_everything=1)
    new["model"]["init_args"] |= {"beta": 0.2, "lora": None}
    new["trainer"]["callbacks"][1]["init_args"] = {"n": 4}
    del new["trainer"]["callbacks"][0]
    inputs = {"data.shards": [("data/new", "1234567890")], "model.init_args.model": [("there", "ab")]}
    old_inputs = {"data.shards": [["data/old", "abcdef"]], "model.init_args.model": [["here", "ab"]]}
    found = find_differences({"settings": settings(seed_everything=0), "inputs": old_inputs}, MadeOf("k", new, inputs))
    assert found.values == [
        "model.beta: 0.1 -> 0.2",
        'model.lora: {"rank": 4} -> null',
        "seed_everything: 0 -> 1",
        "trainer.callbacks[Bench].n: 3 -> 4",
        "trainer.callbacks[Merge]: there -> not there",
        "data.shards: data/old (abcdef) -> data/new (12345678)",
    ]
    assert found.fields == []


def test_equal_settings_do_not_differ_and_a_field_of_one_version_is_none_of_the_other_s() -> None:
    record = {"settings": settings(), "inputs": {"data.shards": [["data/a", None]]}}
    same = find_differences(record, MadeOf("k", settings(data={"new": 1}), {"data.shards": [("data/a", "12")]}))
    assert (same.values, same.fields) == ([], ["data"])
    moved = find_differences(record, MadeOf("k", settings(), {"data.shards": [("data/b", "12")]}))
    assert moved.values == ["data.shards: data/a -> data/b (12)"], "by path, where the content is not known"


def test_another_order_of_the_callbacks_is_told() -> None:
    new = settings()
    new["trainer"]["callbacks"].reverse()
    found = find_differences({"settings": settings()}, MadeOf("k", new))
    assert found.values == ["trainer.callbacks: [Merge] [Bench] -> [Bench] [Merge]"] and found.fields == []


def test_a_name_that_only_one_run_has_differs_where_the_user_has_chosen_it() -> None:
    reward = {"class_path": "my.Near", "weight": 1.0}
    guard = {"class_path": "callbacks.c.Guard", "init_args": {"bounds": {"grpo/kl": {"low": None, "high": 1.0}}}}

    def of(named: dict, rewards: dict, bounds: dict, **data: object) -> dict:
        one = settings(data=data)
        one["model"]["init_args"] |= {"reward_weights": {"a": 1.0} | named, "rewards": [reward | rewards]}
        changed = {"init_args": {"bounds": guard["init_args"]["bounds"] | bounds}}
        one["trainer"]["callbacks"].append(guard | changed)
        return one

    new = of({"b": 2.0}, {"init_args": {"t": 1}}, {"grpo/entropy": {"low": 0.1}}, order="block", weights=[0.5, 0.5])
    found = find_differences({"settings": of({}, {}, {})}, MadeOf("k", new))
    assert found.values == [
        "data.order: not there -> block",
        "data.weights: not there -> [0.5, 0.5]",
        "model.reward_weights.b: not there -> 2.0",
        'model.rewards[Near]: not there -> {"t": 1}',
        'trainer.callbacks[Guard].bounds.grpo/entropy: not there -> {"low": 0.1}',
    ]
    assert found.fields == []
    newer = of({}, {}, {"grpo/kl": {"low": None, "high": 1.0, "most": None}})
    assert find_differences({"settings": of({}, {}, {})}, MadeOf("k", newer)).values == [], "a setting of each bound"


def test_the_question_is_short_and_has_both_answers() -> None:
    many = {f"{k}.py": "1" for k in range(20)}
    for record, words in (({"code": OLD}, "b.py"), ({}, "earlier version"), ({"code": many}, "and 16 more")):
        text = question("outputs/nano/grpo", True, record, NEW)
        assert words in text and "KEEP=1" in text and "--redo" in text and "outputs/nano/grpo is finished" in text
        assert len(text.splitlines()) <= 4
    assert "goes on with it" in question("x", False, {"code": OLD}, NEW)


@pytest.mark.parametrize("target", ["pipeline", "ablations", "sft", "grpo", "sweep", "eval", "synthesize"])
def test_make_passes_the_answer_on(target: str) -> None:
    def last_command(*words: str) -> str:
        command = ["make", "-n", target, "STAMP=Makefile", "CONFIG=x.yaml", *words]
        done = subprocess.run(command, cwd=ROOT, env=outside_make(), capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert "--keep" in last_command("KEEP=1") and "--redo" in last_command("REDO=1")
    assert not {"--keep", "--redo"} & set(last_command("REDO=0").split())


@pytest.mark.parametrize(
    ("target", "absent"),
    [
        ("sft", ["data/nano"]),
        ("grpo", ["data/nano"]),
        ("eval", ["data/nano"]),
        ("sweep", ["data/nano", "outputs/nano/cot_sft"]),
        ("synthesize", ["data/nano", "outputs/nano/cot_sft"]),
        ("pipeline", ["models/nano-base"]),
        ("ablations", ["models/nano-base"]),
    ],
)
def test_make_checks_the_settings_before_it_makes_what_a_command_needs(
    target: str, absent: list[str], tmp_path: Path
) -> None:
    for name in ("setup.cfg", "installed"):
        (tmp_path / name).touch()

    def commands() -> list[str]:
        command = ["make", "-n", "--no-print-directory", "-f", str(ROOT / "Makefile"), target, "STAMP=installed"]
        # `make sweep` calls make again, which looks for the Makefile in this folder.
        command += ["ARGS=--model.sead=1", f"MAKE=make -f {ROOT / 'Makefile'} STAMP=installed"]
        done = subprocess.run(command, cwd=tmp_path, env=outside_make(), capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    check, *making, last = commands()
    assert check == f"{last} --check_without '[{','.join(absent)}]'" and last.endswith("--model.sead=1") and making
    write_json(tmp_path / "data/nano/done.json", {})
    for name in ("models/nano-base/model.safetensors", "outputs/nano/cot_sft/merged"):
        (tmp_path / name).mkdir(parents=True)
    assert commands()[-1] == last and not any("--check_without" in line for line in commands())
