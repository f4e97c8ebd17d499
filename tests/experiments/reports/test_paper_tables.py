"""The paper's numbers as data, and measured rows beside them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.benchmarks.registry import BENCHMARKS
from datamodules.metrics.result_files import write_evaluation
from experiments import print_tables
from experiments.reports import paper_tables
from experiments.reports.pipeline_report import render_report
from experiments.runs.results import Results, write_results
from tests.experiments import phase_results

# Rows whose printed AVG is not the mean of their cells (docs/paper_contradictions.md).
CONTRADICTIONS = {(2, "LLaVA-OV-72B"), (8, "Qwen2.5-VL-7B"), (8, "+ SFT"), (9, "Qwen2.5-VL-7B")}


def write_result(folder: Path, name: str, columns: dict[str, float], averages: dict[str, float], **changes) -> None:
    result = {"benchmark": name, "model": "m", "data_root": "d", "limit": None, "generation": "greedy", "n": 10}
    result |= {"rule": {}, "official": {}, "failures": {}, "format_rate": 100.0}
    result["columns"] = {name: phase_results.cell(score, 10) for name, score in columns.items()}
    result["averages"] = {name: phase_results.cell(score, 10) for name, score in averages.items()}
    write_evaluation(folder, [], result | changes)


def test_the_papers_averages_are_the_means_of_their_rows() -> None:
    _, found = paper_tables.load_paper_tables()
    assert [table.number for table in found] == list(range(2, 10))
    assert sum(len(table.rows) for table in found) == 51
    differing = set()
    for table in found:
        if table.number != 3:
            for row in table.rows:
                *cells, average = row.cells
                if abs(sum(cells) / len(cells) - average) > 0.0501:
                    differing.add((table.number, row.label))
    assert differing == CONTRADICTIONS


def test_every_column_names_a_cell_that_its_benchmark_has() -> None:
    for table in paper_tables.load_paper_tables()[1]:
        for _, key in table.columns:
            if key != "mean":
                name, column = key.split("/")
                averages = BENCHMARKS[name].AVERAGES
                assert column in averages or column in averages["avg"]
    keys = {key for table in paper_tables.load_paper_tables()[1] for _, key in table.columns}
    in_paper = {key.split("/")[0] for key in keys} - {"mean"}  # a benchmark that was added later may have no table
    assert len(in_paper) == 7
    for name in in_paper:
        assert {f"{name}/{column}" for column in BENCHMARKS[name].AVERAGES["avg"]} <= keys


def test_a_measured_row_stands_below_the_papers_with_its_interval(tmp_path: Path) -> None:
    write_result(tmp_path / "eval/m/odinw", "odinw", {"Vector": 50.0}, {})
    write_result(tmp_path / "eval/m/odinw-limit1", "odinw", {"Vector": 0.0}, {}, limit=1)
    text = print_tables.make_tables(tmp_path)
    lines = text.split("## Table 5")[1].split("##")[0].strip().splitlines()
    assert lines[-1] == "| measured: m (d) | – | – | – | – | 50.00 [49.00, 51.00] | – | 10 |"
    assert lines[-2].startswith("| Ours | 20.61 | 91.73 |")
    assert text.count("measured: m") == 1
    rows = list(csv.DictReader((tmp_path / "tables/tables.csv").read_text().splitlines()))
    (measured,) = [row for row in rows if row["kind"] == "measured"]
    assert measured == {
        "table": "5", "row": "m (d)", "kind": "measured", "column": "Vector",
        "score": "50.0000", "low": "49.0000", "high": "51.0000", "n": "10",
    }  # fmt: skip
    printed = sum(len(row.cells) for table in paper_tables.load_paper_tables()[1] for row in table.rows)
    assert sum(row["kind"] == "paper" for row in rows) == printed


def test_table_4_averages_three_benchmarks_and_only_whole_rows(tmp_path: Path) -> None:
    write_result(tmp_path / "eval/m/ref_l4", "ref_l4", {"val": 50.0, "test": 70.0}, {})
    write_result(tmp_path / "eval/m/lisa", "lisa", {"val": 10.0, "test": 20.0}, {})
    measured = paper_tables.find_measured(tmp_path)
    table = paper_tables.with_measured(paper_tables.load_paper_tables()[1], measured)[2]
    assert table.number == 4 and table.rows[-1].cells[-1] is None
    write_result(tmp_path / "eval/m/revos", "revos", {"ReVOS": 100.0}, {})
    average = paper_tables.with_measured([table], paper_tables.find_measured(tmp_path))[0].rows[-1].cells[-1]
    assert average["score"] == pytest.approx(50.0) and average["low"] < 50 < average["high"] and average["n"] == 50


def write_phase(folder: Path, limit: int | None = None, aside: bool = False) -> None:
    """MIG-Bench of a phase: one right of two questions of each task."""
    columns = dict.fromkeys(TASKS, 50.0)
    name = "mig_bench" + ("" if limit is None else f"-limit{limit}") + ("-0123456789abcdef" if aside else "")
    averages = {"avg": 50.0, "in_domain": 50.0, "out_of_domain": 50.0}
    write_result(folder / "benchmarks" / name, "mig_bench", columns, averages, limit=limit)


def test_a_pipelines_phases_stand_in_the_mig_bench_tables_and_in_the_report(tmp_path: Path) -> None:
    write_phase(tmp_path / "nano/grpo")
    write_phase(tmp_path / "nano/sft", aside=True)
    write_phase(tmp_path / "nano/cot_sft", limit=2)
    write_phase(tmp_path / "nano/grpo.0123abcd")
    write_results(tmp_path / "nano/results.json", Results("nano", 0, "abc"))
    measured = paper_tables.find_measured(tmp_path)
    assert list(measured) == ["nano/grpo (d)"]
    assert measured["nano/grpo (d)"]["mig_bench/avg"]["score"] == 50.0
    text = print_tables.make_tables(tmp_path)
    assert text.count("measured: nano/grpo") == 3  # Tables 2, 3 and 9
    page = (tmp_path / "nano/report.html").read_text()
    assert "measured: nano/grpo" in page and "Table 9" in page and "Table 6" not in page
    write_result(tmp_path / "nano/grpo/benchmarks/blink", "blink", {"Jigsaw": 50.0}, {})
    assert "Table 6" in render_report(tmp_path / "nano")


def test_a_row_that_was_decoded_otherwise_says_so_and_is_mixed_with_no_other(tmp_path: Path) -> None:
    write_result(tmp_path / "eval/m/blink", "blink", {"Jigsaw": 50.0}, {})
    write_result(tmp_path / "eval/m/blink-model-generation", "blink", {"Jigsaw": 60.0}, {}, generation="model")
    write_phase(tmp_path / "nano/grpo")
    write_results(tmp_path / "nano/results.json", Results("nano", 0, "abc"))
    write_result(
        tmp_path / "nano/grpo/benchmarks/blink-model-generation", "blink", {"Jigsaw": 80.0}, {}, generation="model"
    )
    measured = paper_tables.find_measured(tmp_path)
    assert {label: cells["blink/Jigsaw"]["score"] for label, cells in measured.items() if "blink/Jigsaw" in cells} == {
        "m (d)": 50.0,
        "m (d), the model's own generation settings": 60.0,
        "nano/grpo (d), the model's own generation settings": 80.0,
    }
    assert "mig_bench/avg" in measured["nano/grpo (d)"]


def test_one_model_that_was_asked_in_two_ways_has_a_row_of_each(tmp_path: Path) -> None:
    for folder, score in (("m", 50.0), ("m--served", 60.0)):
        write_result(tmp_path / f"eval/{folder}/blink", "blink", {"Jigsaw": score}, {})
    write_result(tmp_path / "eval/m--served/lisa", "lisa", {"val": 10.0}, {})
    measured = paper_tables.find_measured(tmp_path)
    found = {label: {key: cell["score"] for key, cell in cells.items()} for label, cells in measured.items()}
    assert found == {
        "m (d), in m": {"blink/Jigsaw": 50.0},
        "m (d), in m--served": {"blink/Jigsaw": 60.0, "lisa/val": 10.0},
    }


def test_results_of_an_earlier_version_are_left_out_and_named(tmp_path: Path, capsys) -> None:
    write_result(tmp_path / "eval/m/blink", "blink", {"Jigsaw": 50.0}, {})
    (tmp_path / "eval/old/blink").mkdir(parents=True)
    (tmp_path / "eval/old/blink/result.json").write_text('{"benchmark": "blink"}')
    assert list(paper_tables.find_measured(tmp_path)) == ["m (d)"]
    assert "left out: " in (said := capsys.readouterr().out) and "eval/old/blink/result.json" in said


def test_a_broken_result_is_a_short_error(tmp_path: Path) -> None:
    (tmp_path / "eval/m/blink").mkdir(parents=True)
    (tmp_path / "eval/m/blink/result.json").write_text("{")
    with pytest.raises(SystemExit, match=r"no tables: .*result\.json is damaged"):
        print_tables.main(["--outputs", str(tmp_path)])
