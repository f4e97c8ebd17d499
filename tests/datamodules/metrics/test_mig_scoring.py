"""MIG-Bench scoring: the official rules with their quirks, ours beside them, and the paper's averages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from datamodules.benchmarks.mig_bench import TASKS, load_mig_bench
from datamodules.metrics.mig_scoring import (
    Prediction,
    average_tasks,
    format_table,
    score_answer,
    score_refused,
    summarise,
)
from datamodules.metrics.official_parsers import extract_box_officially
from datamodules.samples.answer_text import render_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, ImagePart, Sample, TextPart
from tests.beside import SHARED

ROOT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("MIG_BENCH_JSON", SHARED / "data/MIG-Bench/MIG_data.json"))
SIZES = ImageSizes(original=(640, 480), resized=(644, 476))

# Table 2 of the paper: the ten tasks, then in-domain, out-of-domain and AVG of its Tables 2 and 3.
PAPER_ROWS = {
    "Human": ((99.50, 97.87, 98.00, 100.00, 96.88, 100.00, 98.99, 91.06, 92.08, 97.44), (None, None, 97.18)),
    "Qwen2.5-VL-72B": ((43.75, 46.81, 69.98, 34.32, 29.17, 8.31, 62.63, 59.92, 66.34, 41.03), (46.17, 46.27, 46.23)),
    "Qwen2.5-VL-7B": ((28.03, 5.32, 21.81, 15.23, 5.56, 4.07, 13.13, 32.26, 3.96, 2.56), (16.76, 10.82, 13.19)),
    "SFT": ((53.22, 44.68, 82.11, 26.59, 35.07, 39.32, 79.80, 59.72, 53.47, 23.93), (63.61, 40.58, 49.79)),
    "CoT-SFT": ((47.35, 45.74, 76.59, 46.14, 34.03, 28.93, 80.81, 63.93, 66.34, 34.19), (58.42, 48.40, 52.41)),
    "Ours": ((51.52, 43.62, 82.48, 63.41, 38.54, 51.45, 82.83, 69.54, 67.33, 37.61), (67.07, 53.34, 58.83)),
}


def sample(task: str = "diff", box=(0.1, 0.2, 0.5, 0.6), image: int = 1) -> Sample:
    parts = (ImagePart(0), ImagePart(1), TextPart("Where?"))
    return Sample("mig_bench/0", "mig_bench", task, ("a", "b"), parts, BoxAnswer(image, box, ""))


def prediction(task: str, iou: float, official: float = 0.0, **changes) -> Prediction:
    values = {"well_formed": True, "failure": None, "num_tokens": 10, "finished": True} | changes
    return Prediction("id", task, "t", (0, 0, 1, 1), (0, 0, 1, 1), iou, (0, 0, 1, 1), official, **values)


@pytest.mark.parametrize("row", PAPER_ROWS)
def test_the_papers_rows_give_its_averages(row: str) -> None:
    accuracies, printed = PAPER_ROWS[row]
    averages = average_tasks(dict(zip(TASKS, accuracies, strict=True)))
    for key, expected in zip(("in_domain", "out_of_domain", "avg"), printed, strict=True):
        if expected is not None:
            assert averages[key] == pytest.approx(expected, abs=0.00501)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|box_start|>(100,200),(500,600)<|box_end|>", (0.1, 0.2, 0.5, 0.6)),
        ("It's in the second image. (100,200),(500,600)", (0.1, 0.2, 0.5, 0.6)),
        ("[0.1,0.2,0.5,0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("(0.1,0.2),(0.5,0.6)", (0.1, 0.2, 0.5, 0.6)),
        ("(0.1, 0.2, 0.5, 0.6)", (0.1, 0.2, 0.5, 0.6)),
        ("[100, 200, 500, 600]", (0.1, 0.2, 0.5, 0.6)),
        ("<ref>x</ref><box>[[100, 200, 500, 600]]</box>", (0.1, 0.2, 0.5, 0.6)),
        ("<box>100 200 500 600</box>", (0.1, 0.2, 0.5, 0.6)),
        ('```json\n{"bbox_2d": [100, 200, 500, 600], "label": "x"}\n```', (0.1, 0.2, 0.5, 0.6)),
    ],
)
def test_official_extraction_reads_every_form(text: str, expected) -> None:
    assert extract_box_officially(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.0,0.15,1.0,0.5]", (0.0, 0.15, 0.001, 0.5)),  # a lone 1.0 is taken for one thousandth
        ("[0.0,0.15,1.0,0.5] [0.1,0.1,0.2,0.2]", (0.0, 0.15, 1.0, 0.5)),  # not so among several
        ("[0, 0.1, 1, 0.5]", None),  # integers and decimals mixed
        ("(0.1,0.2), (0.5,0.6)", None),  # a space between the points
        ("(1,0),(1000,1)", (0.001, 0.0, 1.0, 0.001)),
        ("(1,0),(1000,1) (2,2),(3,3)", (1.0, 0.0, 1.0, 1.0)),
        ("(300,400),(500,600) then (1,2),(3,4)", (0.3, 0.4, 0.5, 0.6)),  # the first of several
        ("[0.1,0.2,0.3,0.4] (300,400),(500,600)", (0.3, 0.4, 0.5, 0.6)),  # the first form, not the first place
        ("[1280, 720, 1400, 900]", (1.28, 0.72, 1.4, 0.9)),  # pixels are divided too
        ("[-0.1, 0.2, 0.3, 0.4]", None),
        ("no box", None),
        ("", None),
    ],
)
def test_official_extraction_keeps_its_quirks(text: str, expected) -> None:
    box = extract_box_officially(text)
    assert box is None if expected is None else box == pytest.approx(expected)


def test_pixels_are_read_with_the_geometry_of_the_target_image() -> None:
    small = ImageSizes(original=(100, 100), resized=(112, 112))
    text = render_answer(SIZES.to_model((0.1, 0.2, 0.5, 0.6), BoxFormat.ABSOLUTE_PIXELS), "x", "Because.")
    right = score_answer(sample(), text, (small, SIZES), BoxFormat.ABSOLUTE_PIXELS)
    assert right.iou > 0.98 and right.well_formed and right.failure is None
    assert right.official_iou < 0.5  # the official code takes pixels for thousandths
    assert score_answer(sample(image=0), text, (small, SIZES), BoxFormat.ABSOLUTE_PIXELS).iou < 0.1


def test_the_first_box_is_scored_and_an_inverted_one_gets_nothing() -> None:
    text = "(100,200),(500,600) (0,0),(10,10)"
    first = score_answer(sample(), text, (SIZES, SIZES), BoxFormat.RELATIVE_1000)
    assert first.iou == pytest.approx(1.0) and first.official_iou == pytest.approx(1.0)
    inverted = score_answer(sample(), "(500,600),(100,200)", (SIZES, SIZES), BoxFormat.RELATIVE_1000)
    assert inverted.iou == inverted.official_iou == 0.0


def test_an_answer_without_a_box_counts_as_zero_and_is_named() -> None:
    failed = score_answer(sample(), "I cannot see it.", (SIZES, SIZES), BoxFormat.ABSOLUTE_PIXELS)
    assert (failed.iou, failed.official_iou, failed.box, failed.official_box) == (0.0, 0.0, None, None)
    assert failed.failure == "no_json" and not failed.well_formed
    summary = summarise([failed, score_refused(sample(), "truncated_image"), prediction("diff", 0.9)])
    assert summary["parse_failures"] == {"no_json": 1, "truncated_image": 1}
    assert summary["tasks"]["diff"] == pytest.approx(100 / 3)
    assert summary["n"] == 3


def test_thresholds_are_strict_here_and_inclusive_officially() -> None:
    summary = summarise([prediction("diff", 0.5, 0.5), prediction("diff", 0.7, 0.7), prediction("diff", 0.3, 0.3)])
    assert summary["tasks"]["diff"] == pytest.approx(100 / 3)
    assert summary["official"]["tasks"]["diff"] == pytest.approx(200 / 3)
    assert (summary["acc_0.3"], summary["acc_0.7"]) == pytest.approx((200 / 3, 0.0))
    assert (summary["official"]["acc_0.3"], summary["official"]["acc_0.7"]) == pytest.approx((100, 100 / 3))


def test_averages_are_over_tasks_not_questions() -> None:
    many = [prediction("region", 0.9) for _ in range(9)] + [prediction("diff", 0.0), prediction("reasoning", 0.6)]
    summary = summarise(many)
    assert summary["in_domain"] == pytest.approx(50.0)
    assert summary["out_of_domain"] == pytest.approx(100.0)
    assert summary["avg"] == pytest.approx(200 / 3)
    assert summary["mean_iou"] == pytest.approx((0.9 + 0.0 + 0.6) / 3)


def test_a_subset_without_out_of_domain_tasks_has_no_such_average() -> None:
    summary = summarise([prediction("diff", 0.9, finished=False, well_formed=False)])
    assert summary["out_of_domain"] is None and summary["avg"] == 100.0
    assert summary["format_rate"] == 0.0 and summary["truncated_rate"] == 100.0
    assert "out_of_domain" in format_table(summary)
    with pytest.raises(ValueError, match="no predictions"):
        summarise([])


def test_predictions_survive_json() -> None:
    for before in (prediction("diff", 0.25), score_refused(sample(), "prompt_too_long")):
        assert Prediction.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_true_answers_to_the_real_questions_score_full_marks_but_for_the_dirty_ones() -> None:
    if not REAL.is_file():
        pytest.skip(f"real MIG-Bench annotations not found: {REAL} (set MIG_BENCH_JSON)")
    samples, report = load_mig_bench(REAL)
    degenerate = {f"mig_bench/{dirty.position}" for dirty in report.boxes if dirty.rule == "degenerate"}
    predictions = []
    for real in samples:
        x1, y1, x2, y2 = (round(value * 1000) for value in real.answer.box)
        text = f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        predictions.append(score_answer(real, text, [SIZES] * len(real.images), BoxFormat.RELATIVE_1000))
    wrong = {p.id for p in predictions if p.iou <= 0.99}
    assert wrong == degenerate == {p.id for p in predictions if p.official_iou <= 0.99}
    summary = summarise(predictions)
    assert summary["n"] == 4295
    assert summary["tasks"]["common_object"] == pytest.approx(100 * 811 / 816)
    assert summary["official"]["tasks"] == pytest.approx(summary["tasks"])
    assert summary["avg"] == pytest.approx((900 + 100 * 811 / 816) / 10)
