"""The drawn examples of the ablation page: which questions they are, what they show, and when there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.metrics.result_files import RESULT, read_result
from datamodules.persistence.files import write_json
from experiments.reports import ablation_report
from experiments.reports.ablation_summary import Comparison
from experiments.reports.stored_answers import changed_answers
from experiments.runs.results import Results, make_stage, write_results
from tests.experiments.reports.test_every_page import write_answers
from tests.page_faults import page_faults

STARTS = {"cot_sft": "cot_sft", "grpo": "cot_sft"}


@pytest.fixture
def nano(tmp_path: Path, tiny_world: Path) -> Path:
    """An experiment: all boxes of "cot_sft" are 30 of 56 pixels away, and all of "grpo" are right."""
    folder, stages = tmp_path / "nano", []
    for name, shift in (("cot_sft", 30), ("grpo", 0)):
        phase = write_answers(folder, tiny_world / "MIG-Bench", name, shift)
        stages.append(make_stage(name, read_result(phase / "benchmarks/mig_bench" / RESULT), 90))
    write_results(folder / "results.json", Results("nano", 0, "abc", stages=tuple(stages)))
    return folder


def write_page(nano: Path, comparison: Comparison) -> Path:
    home = nano.parent / "nano-ablations"
    ablation_report.write(home, {0: nano}, STARTS, [comparison])
    return home / "ablations.html"


def test_the_first_won_question_of_a_task_is_drawn_before_and_after(browser_page, nano: Path) -> None:
    changed = changed_answers(nano / "cot_sft", nano / "grpo", 3)
    assert (changed.num_won, changed.num_lost, changed.missing) == (4, 0, "")
    texts = [(each["by"], each["text"]["task"], each["text"]["result"]) for each in changed.previews]
    tasks = list(dict.fromkeys(task for _, task, _ in texts))
    assert [by for by, _, _ in texts] == ["cot_sft", "grpo"] * len(tasks), "each question once for each row"
    assert all((float(result.removeprefix("IoU ")) > 0.5) == (by == "grpo") for by, _, result in texts)

    browser_page.goto(write_page(nano, Comparison("grpo", "cot_sft", examples=3)).as_uri())
    assert "4 answers became right from cot_sft to grpo, and 0 became wrong" in browser_page.inner_text("#changed-1")
    assert browser_page.locator("#changed-1 img").count() == len(texts)
    assert page_faults(browser_page) == []


def test_fewer_are_drawn_if_fewer_are_asked_for_and_lost_ones_are_counted(nano: Path) -> None:
    assert len(changed_answers(nano / "cot_sft", nano / "grpo", 1).previews) == 2
    back = changed_answers(nano / "grpo", nano / "cot_sft", 3)
    assert (back.num_won, back.num_lost, back.previews) == (0, 4, [])


def test_a_page_without_examples_or_pictures_says_why(nano: Path) -> None:
    assert "became right" not in write_page(nano, Comparison("grpo", "cot_sft")).read_text()
    for name in STARTS:
        file = nano / name / "benchmarks/mig_bench" / RESULT
        write_json(file, read_result(file) | {"data_root": str(nano / "gone")})
    page = write_page(nano, Comparison("grpo", "cot_sft", examples=3)).read_text()
    assert "No pictures: the benchmark cannot be read" in page and "data:image" not in page


def test_rows_that_were_asked_other_questions_have_no_examples(nano: Path) -> None:
    file = nano / "grpo/benchmarks/mig_bench/predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    assert changed_answers(nano / "cot_sft", nano / "grpo", 3) is None


def test_answers_to_questions_that_have_changed_are_not_drawn_on_the_new_images(nano: Path, tiny_world: Path) -> None:
    file = tiny_world / "MIG-Bench/MIG_data.json"
    text = file.read_text()
    records = json.loads(text)
    try:
        moved = [record | {"answer": [0.0, 0.0, 0.5, 0.25]} for record in records]
        for changed in (moved, records[:1]):
            file.write_text(json.dumps(changed))
            found = changed_answers(nano / "cot_sft", nano / "grpo", 3)
            assert (found.previews, found.missing) == ([], "the questions have changed since")
    finally:
        file.write_text(text)
    result = nano / "grpo/benchmarks/mig_bench" / RESULT
    write_json(result, read_result(result) | {"data_root": "elsewhere"})
    assert changed_answers(nano / "cot_sft", nano / "grpo", 3) is None
