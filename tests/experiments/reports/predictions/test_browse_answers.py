"""`make predictions`: two evaluations of the tiny MIG-Bench become one file, which a real browser opens offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from datamodules.metrics.predictions import Prediction
from datamodules.metrics.result_files import PREDICTIONS, RESULT, write_evaluation
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import ChoiceAnswer
from experiments.reports.predictions import browse_answers
from experiments.reports.predictions.browse_answers import NoAnswers, find_evaluation, write_page
from tests.experiments.phase_results import cell, summary
from tests.experiments.reports.test_every_page import write_answers

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def runs(tmp_path: Path, tiny_world: Path) -> list[Path]:
    """Model "good" has every box right, "bad" has all of them 30 of 56 pixels away."""
    bench = tiny_world / "MIG-Bench"
    return [write_answers(tmp_path / "outputs", bench, name, shift) for name, shift in (("good", 0), ("bad", 30))]


def edit_answer(run: Path, text: str) -> None:
    """Another text for the first answer of an evaluation."""
    file = run / "benchmarks/mig_bench" / PREDICTIONS
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {"text": text}), *others]) + "\n")


def test_a_browser_filters_and_compares_two_models(browser_page, runs: list[Path], tmp_path: Path) -> None:
    edit_answer(runs[1], HOSTILE)
    page = browser_page
    page.goto(write_page(runs, tmp_path / "page.html").as_uri())
    count = page.locator("#count")
    assert count.inner_text() == "4 of 4 questions; good 4 right, bad 0 right"
    assert HOSTILE in page.locator(".group").first.inner_text(), "an answer is text"
    card = page.locator(".group").nth(1)
    page.wait_for_function("[...document.images].every((image) => image.naturalWidth > 0)")
    assert card.locator("img").count() == 2 and "Find it and locate it" in card.inner_text()
    assert card.locator("rect.true").count() == 1 and card.locator("rect.predicted").count() == 2
    assert [text.split("·")[1].strip() for text in card.locator(".score").all_inner_texts()] == ["right", "wrong"]
    card.locator(".answer-item").nth(1).focus()
    assert card.locator("rect.chosen.second").count() == 1 == card.locator("rect.chosen").count()

    # Filters
    page.select_option("#column", label="diff")
    assert count.inner_text().startswith("2 of 4 questions")
    page.select_option("#column", "")
    for kind, number in (("wrong-0", 0), ("wrong-1", 4), ("lost", 4), ("gained", 0), ("both", 0), ("right-0", 4)):
        page.select_option("#kind", kind)
        assert count.inner_text().startswith(f"{number} of 4"), kind
    page.select_option("#kind", "")
    page.fill("#least", "0.9")
    assert count.inner_text().startswith("4 of 4")
    page.select_option("#of", label="bad")
    assert count.inner_text().startswith("0 of 4")
    page.fill("#least", "")
    page.fill("#most", "0.5")
    assert count.inner_text().startswith("4 of 4")
    page.fill("#words", "onerror")
    assert count.inner_text().startswith("1 of 4")


def test_the_page_says_what_it_leaves_out(runs: list[Path], tmp_path: Path) -> None:
    page = write_page(runs[:1], tmp_path / "page.html", max_questions=3, max_megabytes=0).read_text()
    assert "3 of 4 questions are here, evenly over the file (--max_questions)." in page
    assert "6 pictures are left out" in page and "data:image/png" not in page
    assert "The official scores are left out" in page and ">official<" not in page
    size = len(write_page(runs, tmp_path / "page.html", max_megabytes=0.0005).read_text())
    assert size < len(write_page(runs, tmp_path / "page.html").read_text())


def test_without_the_benchmark_the_answers_are_there(runs: list[Path], tmp_path: Path) -> None:
    for run in runs:
        file = run / "benchmarks/mig_bench" / RESULT
        file.write_text(json.dumps(json.loads(file.read_text()) | {"data_root": str(tmp_path / "gone")}))
    page = write_page(runs, tmp_path / "page.html").read_text()
    assert "No pictures and questions: the benchmark cannot be read" in page and "bbox_2d" in page


def test_two_models_of_one_name_are_told_apart_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "elsewhere/outputs/good"
    shutil.copytree(runs[0], other)
    page = write_page([runs[0], other], tmp_path / "page.html").read_text()
    for run in (runs[0], other):
        assert f"wrong: {run / 'benchmarks/mig_bench'}" in page


def test_multiple_choice_has_options_and_no_boxes(browser_page, tmp_path: Path) -> None:
    answer = ChoiceAnswer("B", ("cat", "dog"))
    given = (answer, "B", BoxFormat.RELATIVE_1000, (), 1, True, None)
    prediction = Prediction("blink/0", "Jigsaw", "Jigsaw", *given, value=1.0, correct=True, read="B")
    result = summary(50.0, benchmark="blink", columns={"Jigsaw": cell(100.0)}, data_root=str(tmp_path))
    write_evaluation(tmp_path / "eval/m/blink", [prediction], result)
    browser_page.goto(write_page([tmp_path / "eval/m"], tmp_path / "page.html").as_uri())
    assert browser_page.locator("#least").count() == 0
    assert "option B" in browser_page.locator(".score").inner_text()
    assert "right: B of cat, dog" in browser_page.locator(".group").inner_text()


def test_an_evaluation_is_found_in_a_phase_in_a_models_folder_and_by_itself(runs: list[Path]) -> None:
    home = runs[0] / "benchmarks"
    shutil.copytree(home / "mig_bench", home / "mig_bench-limit2")
    shutil.copytree(home / "mig_bench", home / "blink")
    assert (
        find_evaluation(runs[0]) == find_evaluation(home) == find_evaluation(home / "mig_bench") == home / "mig_bench"
    )
    assert find_evaluation(runs[0], "blink") == home / "blink"


def test_what_cannot_be_shown_is_told_with_its_cure(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "phase/merged").mkdir(parents=True)
    faults = {
        f"make eval MODEL={tmp_path / 'phase/merged'}": ([tmp_path / "phase"], ""),
        "no evaluation with a result.json is there": ([tmp_path / "absent"], ""),
        "did you mean mig_bench": ([runs[0]], "mig_bnech"),
        "give one or two folders, not 3": ([runs[0]] * 3, ""),
    }
    for told, (folders, bench) in faults.items():
        with pytest.raises(NoAnswers, match=told):
            write_page(folders, tmp_path / "page.html", bench)
    file = runs[1] / "benchmarks/mig_bench" / RESULT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"benchmark": "lisa"}))
    with pytest.raises(NoAnswers, match=r"has mig_bench and .* lisa: compare one"):
        write_page(runs, tmp_path / "page.html")
    (runs[0] / "benchmarks/mig_bench" / PREDICTIONS).write_text("{}\n")
    with pytest.raises(SystemExit, match=r"no page of answers: .*predictions.jsonl, line 1: no prediction"):
        browse_answers.main(["--runs", str(runs[0]), "--output", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_answers_to_other_questions_are_not_put_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    file = runs[1] / "benchmarks/mig_bench" / RESULT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_root": "data/nano/validation"}))
    with pytest.raises(NoAnswers, match=r"asked different questions, .* those of data/nano/validation"):
        write_page(runs, tmp_path / "page.html")
