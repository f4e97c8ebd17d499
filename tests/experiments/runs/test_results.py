from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from experiments.runs import results
from experiments.runs.results import Results, make_stage, read_results, write_results


def summary(avg: float = 50.0, **changes: object) -> dict:
    bench = {
        "avg": avg,
        "in_domain": 60.0,
        "out_of_domain": 43.3,
        "tasks": {"diff": 60.0, "reasoning": 43.3},
        "format_rate": 99.0,
        "parse_failures": {"no_box": 2},
        "n": 200,
        "mean_iou": 0.4,
        "official": {},
    }
    return bench | changes


def test_written_results_are_read_back_equal(tmp_path: Path) -> None:
    stages = (make_stage("base", summary(10.0), 12.34), make_stage("cot_sft", summary(30.0), 99))
    written = Results("nano", 1, "abc", stages)
    write_results(tmp_path / "deep" / "results.json", written)
    assert read_results(tmp_path / "deep" / "results.json") == written


def test_a_stage_keeps_exactly_the_agreed_keys(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", Results("nano", 0, "abc", (make_stage("base", summary(), 1),)))
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record) == ["experiment", "seed", "commit", "stages"]
    assert list(record["stages"][0]) == ["name", "mig_bench", "seconds"]
    assert set(record["stages"][0]["mig_bench"]) == {
        "avg", "in_domain", "out_of_domain", "tasks", "format_rate", "parse_failures", "n",
    }  # fmt: skip


def test_stages_stand_in_the_order_in_which_they_ran() -> None:
    ladder = Results("nano", 0, "abc")
    for name in ("base", "grpo", "cot_sft"):
        ladder = ladder.with_stage(make_stage(name, summary(), 1))
    assert [stage.name for stage in ladder.stages] == ["base", "grpo", "cot_sft"]
    assert (ladder.experiment, ladder.seed, ladder.commit) == ("nano", 0, "abc")


def test_a_summary_without_a_key_is_refused_by_name() -> None:
    incomplete = summary()
    del incomplete["format_rate"], incomplete["n"]
    with pytest.raises(ValueError, match=r"'base'.*format_rate.*n"):
        make_stage("base", incomplete, 1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"avg": float("nan")}, "avg is nan"),
        ({"avg": 100.2}, "avg is 100.2"),
        ({"avg": None}, "avg is None"),
        ({"tasks": {"diff": -1}}, "task 'diff' is -1"),
        ({"tasks": {}}, "tasks is empty"),
        ({"n": 0}, "n is 0"),
        ({"parse_failures": 3}, "parse_failures is 3"),
    ],
)
def test_impossible_numbers_are_never_written(tmp_path: Path, changes: dict, fault: str) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=fault):
        write_results(path, Results("nano", 0, "abc", (make_stage("base", summary(**changes), 1),)))
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"experiment": "a", "seed": "0", "commit": "c", "stages": []}', "seed is missing or of the wrong type"),
        ('{"experiment": "a", "seed": 0, "commit": "c", "stages": [{"name": "base"}]}', "exactly name, mig_bench"),
        ('{"experiment": "a", "seed": 0, "commit": "c", "stages": [], "more": 1}', "unknown field 'more'"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=fault) as caught:
        read_results(tmp_path / "results.json")
    assert "results.json" in str(caught.value)


def test_the_same_stage_twice_is_a_fault(tmp_path: Path) -> None:
    stage = make_stage("base", summary(), 1)
    with pytest.raises(ValueError, match="'base' stands twice"):
        write_results(tmp_path / "results.json", Results("nano", 0, "abc", (stage, stage)))


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    results.write_atomic(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_outside_git_the_commit_is_unknown(tmp_path: Path) -> None:
    assert results.current_commit(tmp_path) == "unknown"
