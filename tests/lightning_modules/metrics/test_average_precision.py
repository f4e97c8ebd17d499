"""Average precision against a slow reference, and against COCO's own evaluator where it is installed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from datamodules.benchmarks import mc_bench
from datamodules.benchmarks.mc_bench import group_of
from datamodules.metrics.detections import MAX_DETECTIONS, Detection, find_detections, right_images
from datamodules.metrics.predictions import Prediction
from datamodules.samples.box_matching import WrittenBox
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, BoxesAnswer
from lightning_modules.metrics.average_precision import average_precisions

RULE, OFFICIAL = mc_bench.RULE, mc_bench.OFFICIAL
SIDE = 100  # pixels of every image
Answer = tuple[tuple[WrittenBox, ...], tuple[BoxAnswer, ...]]


def box(rng: random.Random) -> tuple[float, ...]:
    x, y = rng.randrange(60), rng.randrange(60)
    # Even heights: half of a box is never a half in IoU when an odd number of rows is added below it.
    return tuple(value / SIDE for value in (x, y, x + rng.randrange(10, 40), y + rng.randrange(10, 40, 2)))


def random_answer(rng: random.Random) -> Answer:
    """Some true boxes found, some missed, some doubled, some in the wrong image or group, and some invented."""
    groups = rng.choice((1, 1, 2, 3))
    labels = [f"group {rng.randrange(groups) + 1}" for _ in range(rng.choice((0, 1, 2, 5)))]
    true = tuple(BoxAnswer(rng.randrange(2), box(rng), label) for label in labels)
    written = []
    for one in true:
        for _ in range(rng.choice((0, 1, 1, 2))):
            x1, y1, x2, y2 = one.box
            moved = (x1, y1, x2, y2 + rng.choice((0, 0, 5, 21)) / SIDE)
            image = one.image if rng.random() < 0.9 else 1 - one.image
            written.append(WrittenBox(image, moved, one.label if rng.random() < 0.8 else "group 2"))
    written += [WrittenBox(rng.randrange(2), box(rng), "thing") for _ in range(rng.choice((0, 0, 1)))]
    return tuple(rng.sample(written, len(written))), true


def prediction(number: int, column: str, true: tuple[BoxAnswer, ...]) -> Prediction:
    form = BoxFormat.NORMALIZED
    return Prediction(str(number), column, column, BoxesAnswer(true), "", form, (), 0, True, None)


def averages(answers: list[Answer], rule=OFFICIAL, columns=("a",), **more: Any) -> dict[str, Any]:
    predictions = [prediction(k, columns[k % len(columns)], true) for k, (_, true) in enumerate(answers)]
    detections = [find_detections(*answer, rule) for answer in answers]
    return average_precisions(predictions, detections, [0.0] * len(answers), rule, {"avg": columns}, **more)


def slow_reference(answers: list[Answer]) -> float:
    """AP50 in per cent by its definition, one recall after the other, in plain Python."""
    groups = sorted({group_of(one.label) for _, true in answers for one in true})
    total, counts = 0.0, 0
    for group in groups:
        listed: list[bool] = []
        num_true = sum(group_of(one.label) == group for _, true in answers for one in true)
        for written, true in answers:
            for image in (0, 1):
                free = [one.box for one in true if (group_of(one.label), one.image) == (group, image)]
                for one in written:
                    if (group_of(one.label), one.image) != (group, image):
                        continue
                    overlaps = [overlap(one.box, other) for other in free]
                    hit = bool(overlaps) and max(overlaps) >= 0.5
                    if hit:
                        free.pop(len(free) - 1 - overlaps[::-1].index(max(overlaps)))
                    listed.append(hit)
        points = [(sum(listed[:k]) / num_true, sum(listed[:k]) / k) for k in range(1, len(listed) + 1)]
        # COCO's recalls, with their rounding: 0.29 is a little more than 29 of 100 boxes.
        heights = [max((p for r, p in points if r >= level), default=0.0) for level in np.linspace(0, 1, 101)]
        total += num_true * sum(heights) / 101
        counts += num_true
    return 100 * total / counts


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """IoU by counting the pixels of both boxes."""
    first, second = np.zeros((2 * SIDE, 2 * SIDE), bool), np.zeros((2 * SIDE, 2 * SIDE), bool)
    for plane, (x1, y1, x2, y2) in ((first, a), (second, b)):
        plane[round(y1 * SIDE) : round(y2 * SIDE), round(x1 * SIDE) : round(x2 * SIDE)] = True
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_a_slow_reference(seed: int) -> None:
    rng = random.Random(seed)
    answers = [random_answer(rng) for _ in range(40)]
    score = averages(answers)["averages"]["avg"]["score"]
    assert score == pytest.approx(slow_reference(answers), abs=1e-9) and 5 < score < 95


def test_average_precision_is_that_of_cocos_own_evaluator() -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    evaluator = pytest.importorskip("pycocotools.cocoeval")
    rng = random.Random(7)
    answers = [random_answer(rng) for _ in range(150)]

    def row(number: int, one: BoxAnswer | WrittenBox) -> dict[str, Any]:
        x1, y1, x2, y2 = (round(SIDE * value) for value in one.box)
        size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
        return {"image_id": 2 * number + one.image, "category_id": group_of(one.label), "score": 1.0} | size

    truth = coco.COCO()
    true = [row(number, one) for number, (_, found) in enumerate(answers) for one in found]
    truth.dataset = {
        "images": [{"id": k} for k in range(2 * len(answers))],
        "categories": [{"id": k} for k in (1, 2, 3)],
        "annotations": [record | {"id": k} for k, record in enumerate(true, 1)],
    }
    truth.createIndex()
    found = [row(number, one) for number, (written, _) in enumerate(answers) for one in written]
    judged = evaluator.COCOeval(truth, truth.loadRes(found), "bbox")
    judged.evaluate()
    judged.accumulate()
    counts = [sum(record["category_id"] == group for record in true) for group in (1, 2, 3)]
    expected = np.average(judged.eval["precision"][0, :, :, 0, 2].mean(axis=0), weights=counts)
    assert averages(answers)["averages"]["avg"]["score"] == pytest.approx(100 * expected, abs=1e-9)


def test_an_average_is_over_one_list_or_over_its_columns() -> None:
    rng = random.Random(1)
    answers = [random_answer(rng) for _ in range(60)]
    result = averages(answers, columns=("a", "b"))
    assert result["averages"]["avg"]["score"] == pytest.approx(slow_reference(answers))
    columns = [slow_reference(answers[k::2]) for k in (0, 1)]
    assert [result["columns"][name]["score"] for name in "ab"] == pytest.approx(columns)
    macro = averages(answers, replace(OFFICIAL, across="macro"), ("a", "b"))["averages"]["avg"]
    assert macro["score"] == pytest.approx(sum(columns) / 2) and macro["n"] == 60
    for cell in (*result["columns"].values(), result["averages"]["avg"], macro):
        assert 0 < cell["low"] < cell["score"] < cell["high"] < 100
    assert averages(answers, columns=("a", "b")) == result, "the same seed, the same intervals"


def test_questions_count_with_none_all_or_no_detections() -> None:
    one = (BoxAnswer(0, (0.1, 0.1, 0.5, 0.5), "group 1"),)
    hit = (WrittenBox(0, one[0].box, ""),)
    assert averages([(hit, one)])["averages"]["avg"]["score"] == 100.0
    assert averages([(hit, one), ((), one)])["averages"]["avg"]["score"] == pytest.approx(100 * 51 / 101)
    predictions = [prediction(0, "a", one)]
    cell = average_precisions(predictions, [None], [0.0], RULE, {"avg": ("a",)})["averages"]["avg"]
    assert (cell["score"], cell["image_accuracy"], cell["low"], cell["high"]) == (0.0, 0.0, 0.0, 0.0)


def detections(labels: list[str], rule=RULE, true=("group 1", "group 2")) -> list[Detection]:
    """Of boxes with these labels, at the places of true boxes of groups 1 and 2 in turn."""
    places = [(0.1 * k, 0.1, 0.1 * k + 0.09, 0.5) for k in range(len(labels))]
    truth = tuple(BoxAnswer(0, place, true[k % len(true)]) for k, place in enumerate(places))
    written = [WrittenBox(0, place, label) for place, label in zip(places, labels, strict=True)]
    return list(find_detections(written, truth, rule))


def test_groups_are_renamed_by_their_boxes_and_officially_not() -> None:
    exchanged = ["group 2", "group 1"] * 2
    assert detections(exchanged) == [(1, 0, 1), (2, 0, 1)] * 2
    assert detections(exchanged, OFFICIAL) == [(2, 0, 0), (1, 0, 0)] * 2
    assert detections(["group 7", "group 4"]) == [(1, 0, 1), (2, 0, 1)]
    # The larger sum decides: three boxes of group 2 against one.
    assert detections(["group 2", "group 2", "group 1", "group 2", "group 1", "group 2"])[1] == (2, 0, 1)


def test_a_group_that_the_question_does_not_have_does_not_hide_a_wrong_box() -> None:
    elsewhere = WrittenBox(1, (0.0, 0.0, 0.1, 0.1), "group 9")
    true = (BoxAnswer(0, (0.1, 0.1, 0.5, 0.5), "group 1"),)
    found = WrittenBox(0, true[0].box, "cup")
    assert find_detections([found, elsewhere], true, RULE) == ((1, 0, 1), (1, 1, 0))
    assert find_detections([found, elsewhere], true, OFFICIAL) == ((1, 0, 1), (9, 1, 0))
    nowhere = WrittenBox(None, true[0].box, "")
    assert find_detections([nowhere], true, RULE) == ((1, -1, 0),) and find_detections([nowhere], true, OFFICIAL) == ()
    assert not right_images(find_detections([found, nowhere], true, RULE), true)
    assert right_images(find_detections([found, nowhere], true, OFFICIAL), true)


def test_a_true_box_is_found_once_and_a_hundred_boxes_count() -> None:
    true = (BoxAnswer(0, (0.1, 0.1, 0.5, 0.5), "group 1"),)
    copies = [WrittenBox(0, true[0].box, "")] * 300
    found = find_detections(copies, true, RULE)
    assert len(found) == MAX_DETECTIONS and [hit for *_, hit in found] == [1] + [0] * (MAX_DETECTIONS - 1)
