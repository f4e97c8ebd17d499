"""From scored answers to the numbers of a benchmark: averages, details, rates; MIG-Bench's as in the paper."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.benchmarks.base import Rule
from datamodules.benchmarks.mig_bench import AVERAGES, OFFICIAL, RULE, TASKS, load_mig_bench
from datamodules.metrics.predictions import Prediction, Reply
from datamodules.metrics.result_files import format_result, official_gap, result_metrics
from datamodules.metrics.scoring import score_reply
from datamodules.samples.answer_text import render_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes, box_fault
from datamodules.samples.sample import BoxAnswer, ChoiceAnswer, ImagePart, Sample, TextPart
from lightning_modules.metrics.accuracy import GroundingAccuracy
from lightning_modules.metrics.summary import summarise
from tests.beside import SHARED

REAL = Path(os.environ.get("MIG_BENCH_JSON", SHARED / "data/MIG-Bench/MIG_data.json"))
SIZES = ImageSizes(original=(640, 480), resized=(644, 476))
TEST_RULE = Rule(source="test")

# Table 2 of the paper: the ten tasks, then in-domain, out-of-domain and AVG of its Tables 2 and 3.
PAPER_ROWS = {
    "Human": ((99.50, 97.87, 98.00, 100.00, 96.88, 100.00, 98.99, 91.06, 92.08, 97.44), (None, None, 97.18)),
    "Qwen2.5-VL-72B": ((43.75, 46.81, 69.98, 34.32, 29.17, 8.31, 62.63, 59.92, 66.34, 41.03), (46.17, 46.27, 46.23)),
    "Qwen2.5-VL-7B": ((28.03, 5.32, 21.81, 15.23, 5.56, 4.07, 13.13, 32.26, 3.96, 2.56), (16.76, 10.82, 13.19)),
    "SFT": ((53.22, 44.68, 82.11, 26.59, 35.07, 39.32, 79.80, 59.72, 53.47, 23.93), (63.61, 40.58, 49.79)),
    "CoT-SFT": ((47.35, 45.74, 76.59, 46.14, 34.03, 28.93, 80.81, 63.93, 66.34, 34.19), (58.42, 48.40, 52.41)),
    "Ours": ((51.52, 43.62, 82.48, 63.41, 38.54, 51.45, 82.83, 69.54, 67.33, 37.61), (67.07, 53.34, 58.83)),
}


def prediction(task: str, iou: float, official: float = 0.0, column: str | None = None, **changes) -> Prediction:
    """A scored answer to a question for one box."""
    values = {"well_formed": True, "failure": None, "num_tokens": 10, "finished": True, "refused": None} | changes
    answer, box_format = BoxAnswer(0, (0.0, 0.0, 1.0, 1.0), ""), BoxFormat.NORMALIZED
    return Prediction(
        "id", column or task, task, answer, "t", box_format, (SIZES,), value=iou, official_value=official, **values
    )


def mig_bench(predictions: list[Prediction]) -> dict:
    return summarise(predictions, RULE, OFFICIAL, AVERAGES)


def scores(result: dict, kind: str = "averages") -> dict[str, float]:
    return {name: cell["score"] for name, cell in result[kind].items()}


@pytest.mark.parametrize("row", PAPER_ROWS)
def test_the_papers_rows_give_its_averages(row: str) -> None:
    accuracies, printed = PAPER_ROWS[row]
    metric = GroundingAccuracy([(task, task) for task in TASKS], RULE, AVERAGES)
    metric.update([], [])
    metric.count += 10_000
    for place, accuracy in enumerate(accuracies):
        metric.hits[place] += round(100 * accuracy)
    averages = scores(metric.compute())
    for key, expected in zip(("in_domain", "out_of_domain", "avg"), printed, strict=True):
        if expected is not None:
            assert averages[key] == pytest.approx(expected, abs=0.00501)


def test_thresholds_are_strict_here_and_inclusive_officially() -> None:
    result = mig_bench([prediction("diff", iou, iou) for iou in (0.5, 0.7, 0.3)])
    assert scores(result, "columns")["diff"] == pytest.approx(100 / 3)
    assert scores(result["official"], "columns")["diff"] == pytest.approx(200 / 3)
    details, official = result["details"], result["official"]["details"]
    assert (details["acc_0.3"], details["acc_0.7"]) == pytest.approx((200 / 3, 0.0))
    assert (official["acc_0.3"], official["acc_0.7"]) == pytest.approx((100, 100 / 3))


def test_averages_are_over_tasks_not_questions() -> None:
    many = [prediction("region", 0.9) for _ in range(9)] + [prediction("diff", 0.0), prediction("reasoning", 0.6)]
    result = mig_bench(many)
    assert scores(result) == pytest.approx({"avg": 200 / 3, "in_domain": 50.0, "out_of_domain": 100.0})
    assert result["details"]["mean_iou"] == pytest.approx((0.9 + 0.0 + 0.6) / 3)


def test_a_subset_without_out_of_domain_tasks_has_no_such_average() -> None:
    result = mig_bench([prediction("diff", 0.9, finished=False, well_formed=False)])
    assert scores(result) == {"avg": 100.0, "in_domain": 100.0}
    assert result["format_rate"] == 0.0 and result["truncated_rate"] == 100.0
    logged = result_metrics({"benchmark": "mig_bench"} | result, "_val")
    assert logged["mig_bench_val/diff"] == logged["mig_bench_val/avg"] == 100.0
    assert "mig_bench_val/out_of_domain" not in logged and logged["mig_bench_val/official_avg"] == 0.0
    assert "in_domain" in format_result({"benchmark": "mig_bench"} | result)
    with pytest.raises(ValueError, match="no predictions"):
        mig_bench([])


def test_columns_average_units_or_questions_and_averages_columns_or_questions() -> None:
    predictions = [prediction("u1", 0.9, column="x")] + [prediction("u2", 0.0, column="x") for _ in range(3)]
    predictions += [prediction("u3", 0.9, column="y") for _ in range(4)]
    averages = {"avg": ("x", "y", "z"), "first": ("x",), "absent": ("z",)}

    def found(rule: Rule) -> list[float]:
        result = summarise(predictions, rule, rule, averages)
        assert set(result["averages"]) == {"avg", "first"}, "without the column and the average that nobody asked"
        assert result["details"]["acc_0.5"] == result["averages"]["avg"]["score"]
        return [result["columns"]["x"]["score"], result["averages"]["avg"]["score"]]

    assert found(TEST_RULE) == [25.0, 62.5]
    assert found(replace(TEST_RULE, within="macro")) == [50.0, 75.0]
    assert found(replace(TEST_RULE, across="micro")) == [25.0, 62.5]  # columns of one size
    predictions.pop()
    assert found(replace(TEST_RULE, across="micro"))[1] == pytest.approx(100 * 4 / 7)


def test_options_have_no_details_and_no_format() -> None:
    sample = Sample("c/0", "c", "t", ("a",), (ImagePart(0), TextPart("?")), ChoiceAnswer("B", ("one", "two")))
    replies = [score_reply(sample, Reply(text, ()), BoxFormat.NORMALIZED, TEST_RULE, TEST_RULE) for text in "BA"]
    for threshold in (0.0, 0.5, 1.0):  # of boxes: it says nothing of options
        rule = replace(TEST_RULE, threshold=threshold)
        result = summarise(replies, rule, rule, {"avg": ("t",)})
        assert scores(result) == {"avg": 50.0} and result["rule"]["threshold"] == threshold
        assert result["details"] == {} and result["format_rate"] is None


def test_a_well_formed_answer_is_counted_and_a_refused_question_is_not() -> None:
    sample = Sample("m/0", "m", "diff", ("a",), (ImagePart(0), TextPart("?")), BoxAnswer(0, (0.1, 0.2, 0.5, 0.6), ""))
    text = render_answer(SIZES.to_model(sample.answer.box, BoxFormat.ABSOLUTE_PIXELS), "x", "Because.")
    replies = [Reply(text, (SIZES,)), Reply(text, (), refused="prompt_too_long"), Reply("I do not know.", (SIZES,))]
    found = [score_reply(sample, reply, BoxFormat.ABSOLUTE_PIXELS, RULE, OFFICIAL) for reply in replies]
    result = mig_bench(found)
    assert result["format_rate"] == result["columns"]["diff"]["score"] == pytest.approx(100 / 3)
    assert result["failures"] == {"no_json": 1, "prompt_too_long": 1}
    assert result["official"]["columns"]["diff"]["score"] == 0.0  # the official code takes pixels for thousandths


def test_official_scores_that_mean_nothing_are_left_out_with_the_reason() -> None:
    pixels = [replace(prediction("diff", 0.9), box_format=BoxFormat.ABSOLUTE_PIXELS)]
    known = {"benchmark": "mig_bench", "limit": None, "generation": "greedy"}
    result, other = known | mig_bench(pixels), known | mig_bench([prediction("diff", 0.9)])
    assert official_gap(other) is None and "official" in format_result(other).splitlines()[0]
    assert "official" not in format_result(result).splitlines()[0] and official_gap(result) in format_result(result)
    assert "mig_bench/official_avg" in result_metrics(other) and "mig_bench/official_avg" not in result_metrics(result)
    own = known | summarise(pixels, TEST_RULE, TEST_RULE, {"avg": ("diff",)})
    assert official_gap(own) is None, "a rule with the project's own reader knows pixels"
    assert official_gap({"official": {}}) is None, "a result of an earlier version"


def test_true_answers_to_the_real_questions_score_full_marks_but_for_the_dirty_ones() -> None:
    if not REAL.is_file():
        pytest.skip(f"real MIG-Bench annotations not found: {REAL} (set MIG_BENCH_JSON)")
    samples = load_mig_bench(REAL)
    degenerate = {sample.id for sample in samples if box_fault(sample.answer.box) == "degenerate"}
    predictions = []
    for real in samples:
        x1, y1, x2, y2 = (round(value * 1000) for value in real.answer.box)
        reply = Reply(f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>", (SIZES,) * len(real.images))
        predictions.append(score_reply(real, reply, BoxFormat.RELATIVE_1000, RULE, OFFICIAL))
    wrong = {p.id for p in predictions if p.value <= 0.99}
    assert wrong == degenerate == {p.id for p in predictions if p.official_value <= 0.99}
    result = mig_bench(predictions)
    assert result["n"] == 4295 and scores(result, "columns")["common_object"] == 100 * 811 / 816
    assert scores(result["official"], "columns") == scores(result, "columns")
    assert scores(result)["avg"] == pytest.approx((900 + 100 * 811 / 816) / 10)
