from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.benchmarks.mig_bench import AVERAGES, OFFICIAL, RULE
from datamodules.metrics.predictions import Prediction
from datamodules.persistence.files import read_json, write_json
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer
from experiments.reports import ablation_report
from experiments.reports.ablation_summary import Comparison, Finding
from experiments.runs.results import Results, make_stage, read_results, write_results
from lightning_modules.metrics.summary import summarise
from tests.experiments.phase_results import write_mig_bench

TASKS = ("diff", "region", "reasoning", "multi_view")
STARTS = {"base": "base", "sft": "base", "cot_sft": "base", "grpo": "cot_sft"}


def add_stage(folder: Path, name: str, num_right: int, num_questions: int = 20) -> None:
    """A finished stage whose answers to the first `num_right` questions of every task are right."""
    truth = BoxAnswer(0, (0, 0, 1, 1), "")
    predictions = [
        Prediction(
            f"{task}/{k}",
            task,
            task,
            truth,
            "\u2028",
            BoxFormat.NORMALIZED,
            (),
            3,
            True,
            None,
            value=float(k < num_right),
            correct=k < num_right,
            well_formed=True,
        )
        for task in TASKS
        for k in range(num_questions)
    ]
    result = summarise(predictions, RULE, OFFICIAL, AVERAGES)
    write_mig_bench(folder / name, result, predictions)
    if name != "base":
        write_json(folder / name / "started.json", {"key": "k", "commit": f"{name}{num_right}"})
    path = folder / "results.json"
    results = read_results(path) if path.is_file() else Results(folder.name, 0, "abc123")
    write_results(path, replace(results, stages=(*results.stages, make_stage(name, result, 90))))


@pytest.fixture
def folders(tmp_path: Path) -> dict[int, Path]:
    """Three seeds: two finished, one that has only begun."""
    folders = {seed: tmp_path / f"nano-seed{seed}" for seed in range(3)}
    for seed, right in ((0, (1, 10, 12, 15)), (1, (1, 11, 12, 17))):
        for name, count in zip(STARTS, right, strict=True):
            add_stage(folders[seed], name, count)
    add_stage(folders[2], "base", 1)
    return folders


def test_the_rows_have_mean_spread_and_range_of_the_seeds_that_are_there(tmp_path: Path, folders) -> None:
    text = ablation_report.write(tmp_path / "home", folders, STARTS, [])
    summary = read_json(tmp_path / "home" / "ablations.json")
    rows = {row["name"]: row for row in summary["rows"]}
    assert [len(row["seeds"]) for row in rows.values()] == [3, 2, 2, 2]
    assert rows["grpo"]["mean"]["avg"] == 80 and rows["grpo"]["std"]["avg"] == pytest.approx(7.0711, abs=1e-4)
    assert (rows["grpo"]["low"]["avg"], rows["grpo"]["high"]["avg"], rows["grpo"]["mean"]["minutes"]) == (75, 85, 1.5)
    assert "| grpo | cot_sft | 2 | 80.00 ± 7.07 [75.00, 85.00] |" in text
    assert "Not there yet: grpo at seed 2." in text and "Not there yet: base" not in text
    assert "| grpo | 1 | 85.00 | 85.00 | 85.00 | 100.00 | 80 | 1.5 | grpo17 |" in text


def test_each_row_has_the_commit_it_was_trained_at_and_not_the_last_commands(tmp_path: Path, folders) -> None:
    text = ablation_report.write(tmp_path / "home", folders, STARTS, [])
    rows = {row["name"]: row["seeds"] for row in read_json(tmp_path / "home" / "ablations.json")["rows"]}
    commits = {name: [seed["commit"] for seed in seeds.values()] for name, seeds in rows.items()}
    assert commits["cot_sft"] == ["cot_sft12", "cot_sft12"] and commits["grpo"] == ["grpo15", "grpo17"]
    assert commits["base"] == [None, None, None], "the model as it is given: nothing here has trained it"
    page = (tmp_path / "home" / "ablations.html").read_text()
    assert "grpo15" in page and "grpo17" in text and "abc123" not in page + text


def test_aims_are_told_with_their_figure_whether_reached_or_not(tmp_path: Path, folders) -> None:
    comparisons = [
        Comparison("grpo", "sft", at_least=9.04),
        Comparison("grpo", "cot_sft", at_least=30),
        Comparison("cot_sft", "sft", more_than=7.5),
        Comparison("sft", "base", more_than=90, or_both_at_most=60),
        Comparison("sft", "base", more_than=90, or_both_at_most=52),
    ]
    text = ablation_report.write(tmp_path / "home", folders, STARTS, comparisons)
    records = read_json(tmp_path / "home" / "ablations.json")["comparisons"]
    assert [record["reached"] for record in records] == [True, False, False, True, False]
    assert [record["sure"] for record in records] == [True, False, False, None, False]
    first = records[0]
    assert first["seeds"] == [0, 1] and first["by_seed"] == {"0": 25, "1": 30}
    assert first["differences"]["avg"]["value"] == pytest.approx(27.5) and first["differences"]["avg"]["p"] < 0.01
    assert "| grpo − sft >= 9.04 | yes | +27.50 |" in text and "| grpo − cot_sft >= 30 | no | +20.00 |" in text
    assert "| sft − base > 90 or both AVG <= 60 | yes | +47.50 |" in text and "2 of 3" in text


def test_findings_are_shown_not_shown_or_opposite_by_their_interval(tmp_path: Path, folders) -> None:
    comparisons = [Comparison("grpo", "sft"), Comparison("sft", "grpo"), Comparison("cot_sft", "sft")]
    findings = [
        Finding("RL beats SFT", "grpo", "sft", paper=9.04),
        Finding("SFT beats RL", "sft", "grpo", figure="in_domain"),
        Finding("by far", "grpo", "sft", more_than=25),
        Finding("RL carries over", "grpo", "sft", figure="out_of_domain - in_domain"),
    ]
    text = ablation_report.write(tmp_path / "home", folders, STARTS, comparisons, findings)
    records = read_json(tmp_path / "home" / "ablations.json")["findings"]
    assert [record["verdict"] for record in records] == ["shown", "opposite", "not shown", "not shown"]
    assert "| RL beats SFT | shown | grpo − sft | AVG | +27.50 |" in text and "| +9.04 |" in text
    assert "grpo − sft > 25" in text and "out-of-domain − in-domain" in text
    nothing = ablation_report.write(tmp_path / "other", {7: tmp_path / "none"}, STARTS, comparisons, findings)
    assert "| RL beats SFT | not measured | grpo − sft | AVG | – | – | – | +9.04 |" in nothing


def test_a_comparison_without_a_seed_or_without_answers_says_so(tmp_path: Path, folders) -> None:
    comparisons = [Comparison("grpo", "sft", at_least=9.04), Comparison("grpo", "extra", more_than=0)]
    (folders[0] / "grpo/benchmarks/mig_bench/predictions.jsonl").unlink()
    add_stage(folders[1], "extra", 3, num_questions=19)
    starts = STARTS | {"extra": "base"}
    text = ablation_report.write(tmp_path / "home", folders, starts, comparisons)
    records = read_json(tmp_path / "home" / "ablations.json")["comparisons"]
    assert records[0]["missing"].startswith("the single answers") and records[0]["reached"] is True
    assert records[1]["missing"] == "the rows were asked different questions"
    assert records[0]["differences"] == {} and "| grpo − sft >= 9.04 | yes | +27.50 | – | – | – | – | 2 of 3 |" in text
    nothing = ablation_report.write(tmp_path / "other", {7: tmp_path / "none"}, starts, comparisons)
    assert "| grpo − sft >= 9.04 | not measured | – | – | – | – | – | 0 of 1 |" in nothing


def test_answers_that_are_not_those_of_the_figures_are_not_believed(tmp_path: Path, folders) -> None:
    file = folders[0] / "results.json"
    record = json.loads(file.read_text())
    record["stages"][3]["mig_bench"]["tasks"]["diff"] = 1.0
    file.write_text(json.dumps(record))
    ablation_report.write(tmp_path / "home", folders, STARTS, [Comparison("grpo", "sft")])
    (record,) = read_json(tmp_path / "home" / "ablations.json")["comparisons"]
    assert record["missing"].startswith("the single answers") and record["reached"] is None


def test_the_page_holds_all_tables_and_needs_nothing_from_outside(tmp_path: Path, folders) -> None:
    ablation_report.write(tmp_path / "home", folders, STARTS, [Comparison("grpo", "sft", at_least=9.04)])
    page = (tmp_path / "home" / "ablations.html").read_text()
    for text in (
        "Rows",
        "Aims",
        "Differences",
        "Every seed",
        "80.00 ± 7.07",
        "grpo15",
        'class="bar-value"',
        "&gt;= 9.04",
    ):
        assert text in page
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*|url\(|@import|<script", page) == []


def test_a_task_that_one_seed_was_not_asked_is_averaged_over_the_others(tmp_path: Path, folders) -> None:
    for seed in (0, 1):
        file = folders[seed] / "results.json"
        record = json.loads(file.read_text())
        record["stages"][3]["mig_bench"]["tasks"].pop("diff" if seed else "region")
        file.write_text(json.dumps(record))
    text = ablation_report.write(tmp_path / "home", folders, STARTS, [])
    assert "| diff | 5.00 | 52.50 | 60.00 | 75.00 |" in text and "| region | 5.00 | 52.50 | 60.00 | 85.00 |" in text


def test_wandb_gets_every_rows_figures_and_differences(tmp_path: Path, folders) -> None:
    ablation_report.write(tmp_path / "home", folders, STARTS, [Comparison("grpo", "sft", at_least=9.04)])
    values, tables = ablation_report.figures(tmp_path / "home")
    assert values["grpo/avg"] == 80 and values["grpo-sft/avg"] == pytest.approx(27.5) and values["grpo/avg_std"] > 7
    assert len(tables["Rows"]) == 5 and all(len(row) == len(rows[0]) for rows in tables.values() for row in rows)


def test_rows_that_were_asked_other_questions_of_the_same_ids_have_no_difference(tmp_path: Path, folders) -> None:
    file = folders[1] / "grpo/benchmarks/mig_bench/result.json"
    comparison = Comparison("grpo", "cot_sft", at_least=1)
    for other in ({"data_root": "data/nano/validation"}, {"questions": "0123"}):
        before = read_json(file)
        write_json(file, before | other)
        if "questions" in other:  # of both: one alone is of an earlier version
            for folder, name in ((folders[0], "grpo"), (folders[0], "cot_sft"), (folders[1], "cot_sft")):
                known = folder / name / "benchmarks/mig_bench/result.json"
                write_json(known, read_json(known) | {"questions": "4567"})
        ablation_report.write(tmp_path / "home", folders, STARTS, [comparison])
        (record,) = read_json(tmp_path / "home/ablations.json")["comparisons"]
        assert record["missing"] == "the rows were asked different questions"
        assert record["differences"] == {} and record["reached"] is None
        write_json(file, before)


def test_one_question_a_task_and_one_seed_give_no_interval(tmp_path: Path) -> None:
    """Every resample would be the question itself, and any difference would look certain."""
    for name, right in (("base", 0), ("sft", 0), ("cot_sft", 0), ("grpo", 1)):
        add_stage(tmp_path / "nano", name, right, num_questions=1)
    ablation_report.write(tmp_path / "home", {0: tmp_path / "nano"}, STARTS, [Comparison("grpo", "cot_sft")])
    (record,) = read_json(tmp_path / "home/ablations.json")["comparisons"]
    assert record["by_seed"] == {"0": 100.0} and record["differences"] == {}
    assert record["missing"] == "a task has too few questions for an interval with one seed"
