from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from datamodules.metrics.result_files import OtherVersion
from experiments.runs import results
from experiments.runs.results import Results, find_mig_bench, make_stage, read_mig_bench, read_results, write_results
from tests.experiments.phase_results import summary, write_mig_bench


def test_written_results_are_read_back_equal(tmp_path: Path) -> None:
    stages = (make_stage("base", summary(10.0), 12.34), make_stage("cot_sft", summary(30.0), 99))
    written = Results("nano", 1, "abc", stages)
    write_results(tmp_path / "deep" / "results.json", written)
    assert read_results(tmp_path / "deep" / "results.json") == written


def test_a_stage_keeps_exactly_the_agreed_keys(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", Results("nano", 0, "abc", (make_stage("base", summary(), 1),)))
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record) == ["version", "experiment", "seed", "commit", "stages"]
    assert list(record["stages"][0]) == ["name", "mig_bench", "seconds"]
    assert set(record["stages"][0]["mig_bench"]) == {
        "avg", "in_domain", "out_of_domain", "tasks", "format_rate", "parse_failures", "n",
    }  # fmt: skip


def test_a_stage_is_made_of_the_result_of_its_evaluation() -> None:
    result = summary(12.0)
    del result["averages"]["out_of_domain"]  # no task of it was asked
    assert make_stage("base", result, 1.26).mig_bench == {
        "avg": 12.0, "in_domain": 60.0, "out_of_domain": None, "tasks": {"diff": 60.0, "reasoning": 43.3},
        "format_rate": 99.0, "parse_failures": {"no_box": 2}, "n": 200,
    }  # fmt: skip


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_results(tmp_path / "results.json", Results("a", 0, "c", (make_stage("base", summary(float("nan")), 1),)))
    assert not (tmp_path / "results.json").exists()


def test_a_phases_result_is_that_of_all_questions_if_there_is_one(tmp_path: Path) -> None:
    phase = tmp_path / "grpo"
    assert find_mig_bench(phase) is None and read_mig_bench(phase) == {}
    some = write_mig_bench(phase, summary(10.0, limit=20)).rename(phase / "benchmarks/mig_bench-limit20")
    assert find_mig_bench(phase) == some
    more = write_mig_bench(phase, summary(20.0, limit=200)).rename(phase / "benchmarks/mig_bench-limit200")
    assert find_mig_bench(phase) == more, "more questions"
    sampled = write_mig_bench(phase, summary(25.0, generation="model"))
    sampled = sampled.rename(phase / "benchmarks/mig_bench-model-generation")
    assert find_mig_bench(phase) == sampled, "all questions"
    write_mig_bench(phase, summary(30.0))
    assert read_mig_bench(phase)["averages"]["avg"]["score"] == 30.0


def test_an_evaluation_of_an_earlier_version_is_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "mig_bench.json").write_text("{}")
    with pytest.raises(OtherVersion, match=r"mig_bench\.json was written by an earlier version.*make pipeline"):
        find_mig_bench(tmp_path)
    write_mig_bench(tmp_path, summary())
    assert find_mig_bench(tmp_path) == tmp_path / "benchmarks/mig_bench", "evaluated again"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not valid JSON"),
        ("[]", "was written by an earlier version of the project: the command that made it"),
        ('{"experiment": "a", "seed": 0, "commit": "c", "stages": []}', "an earlier version"),
        ('{"version": 2, "experiment": "a", "seed": 0, "commit": "c", "stages": [{"name": "base"}]}', "is damaged"),
        ('{"version": 2, "experiment": "a", "seed": 0, "commit": "c"}', "is damaged"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=fault) as caught:
        read_results(tmp_path / "results.json")
    assert "results.json" in str(caught.value)


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
