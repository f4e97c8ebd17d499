"""MC-Bench: its files, answers without a box, groups, and the real annotations where they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.benchmarks import mc_bench
from datamodules.benchmarks.mc_bench import CONTRADICTION, FILE, OUTSIDE, group_of
from datamodules.images.image_loading import load_image
from datamodules.metrics.predictions import Prediction, Reply
from datamodules.metrics.result_files import format_result, read_predictions, result_metrics, write_evaluation
from datamodules.metrics.scoring import rescore, score_reply
from datamodules.samples.boxes import BoxFormat, ImageSizes, box_fault
from datamodules.samples.sample import Sample
from datamodules.synthetic.benchmark_replicas.write import write_replica
from lightning_modules.metrics.summary import summarise
from tests.beside import SHARED

REAL = SHARED / "data/MC-Bench"
RULES = (mc_bench.RULE, mc_bench.OFFICIAL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mc_bench")
    write_replica("mc_bench", root, count=14)
    return root / "MC-Bench"


def written(boxes: list[tuple[int, list[float], str]]) -> str:
    """An answer: (image from 0, unit box, label) of each box."""
    return json.dumps([{"image": image + 1, "bbox_2d": list(box), "label": label} for image, box, label in boxes])


def score(sample: Sample, text: str, refused: str | None = None) -> Prediction:
    sizes = tuple(ImageSizes(tuple(size), tuple(size)) for size in sample.extra["sizes"])
    return score_reply(sample, Reply(text, sizes, refused=refused), BoxFormat.NORMALIZED, *RULES)


def truth(sample: Sample) -> list[tuple[int, list[float], str]]:
    return [(one.image, list(one.box), one.label) for one in sample.answer.boxes]


def result_of(predictions: list[Prediction]) -> dict[str, Any]:
    return {"benchmark": "mc_bench"} | summarise(predictions, *RULES, mc_bench.AVERAGES)


def test_the_replica_is_like_the_real_file(folder: Path) -> None:
    benchmark = mc_bench.load(folder)
    boxes = [len(sample.answer.boxes) for sample in benchmark.samples]
    groups = [{group_of(one.label) for one in sample.answer.boxes} for sample in benchmark.samples]
    assert len(boxes) == 42 and boxes.count(0) == 6 and max(boxes) >= 4, "descriptions without an answer, and with many"
    assert (
        {1} in groups
        and {1, 2} in groups
        and benchmark.dropped
        == {
            "box in 0-1, not pixels": 0,
            CONTRADICTION: 1,
            OUTSIDE: 0,
        }
    )
    assert {len({one.image for one in sample.answer.boxes}) for sample in benchmark.samples} == {0, 1, 2}
    for sample in benchmark.samples:
        images = [load_image(data, 10**5) for data in benchmark.load(sample).images]
        assert [list(image.size) for image in images] == sample.extra["sizes"]
        assert all(max(image.size) <= 112 for image in images)
        assert all(box_fault(one.box) is None for one in sample.answer.boxes)


def test_a_perfect_answerer_gets_100_and_a_wrong_one_0(folder: Path) -> None:
    samples = mc_bench.load(folder).samples
    right = result_of([score(sample, written(truth(sample))) for sample in samples])
    # Wrong: a box in every image that has none, and no box where both images have some.
    boxed = [{one.image for one in sample.answer.boxes} for sample in samples]
    boxes = [[(image, [0.4, 0.4, 0.5, 0.5], "") for image in {0, 1} - images] for images in boxed]
    wrong = result_of([score(sample, written(found)) for sample, found in zip(samples, boxes, strict=True)])
    for result, expected in ((right, 100.0), (wrong, 0.0)):
        for numbers in (result, result["official"]):
            cells = numbers["columns"] | numbers["averages"]
            assert list(cells) == ["Referring", "Comparison", "Reasoning", "avg"]
            for cell in cells.values():
                assert (cell["score"], cell["image_accuracy"], cell["f1"]) == (expected, expected, expected)
                assert (cell["low"], cell["high"]) == (expected, expected)
    assert right["failures"] == {} and right["averages"]["avg"]["n"] == 42
    assert result_metrics(right)["mc_bench/image_accuracy/avg"] == 100.0
    assert "images" in format_result(right).splitlines()[0]


def test_an_empty_list_is_the_right_answer_where_there_is_none(folder: Path) -> None:
    sample = next(sample for sample in mc_bench.load(folder).samples if not sample.answer.boxes)
    fenced = "<think>t</think><answer>```json\n[]\n```</answer>"
    for text, failure, project, official in (
        (fenced, None, True, True),
        ("There is none: []", None, True, True),
        ("There is none.", "no_json", False, True),  # the official files cannot tell it from "none"
        ("", "empty", False, True),
        ("<think>so", "no_answer", False, True),
        ('{"object": "none"}', "no_box", False, True),
        (written([(0, [0, 0, 1, 1], "")]), None, False, False),
    ):
        found = score(sample, text)
        assert (found.failure, found.correct, found.official_correct) == (failure, project, official), text
        assert (found.f1, found.official_f1) == (float(project), float(official))
        cells = result_of([found])["averages"]["avg"], result_of([found])["official"]["averages"]["avg"]
        assert [cell["image_accuracy"] for cell in cells] == [100.0 * project, 100.0 * official], text
        assert [cell["score"] for cell in cells] == [0.0, 0.0], "no true box: no precision"
    assert score(sample, fenced).well_formed and not score(sample, "[]").well_formed
    assert not score(sample, fenced, refused="missing_image").correct


def test_a_question_with_boxes_is_wrong_without_one(folder: Path) -> None:
    sample = next(sample for sample in mc_bench.load(folder).samples if sample.answer.boxes)
    for text in ("[]", "none"):
        found = score(sample, text)
        assert (found.correct, found.official_correct, found.f1) == (False, False, 0.0)
    assert score(sample, "none").detections is None and score(sample, "[]").detections == ()


def test_stored_answers_are_scored_again_without_the_data(folder: Path, tmp_path: Path) -> None:
    samples = mc_bench.load(folder).samples
    found = [score(sample, written(truth(sample)[:2])) for sample in samples]
    result = result_of(found)
    assert 0 < result["averages"]["avg"]["score"] < 100
    write_evaluation(tmp_path, found, result)
    stored = read_predictions(tmp_path / "predictions.jsonl")
    assert stored == found and result_of([rescore(one, *RULES) for one in stored]) == result


def test_a_picture_of_another_size_than_the_annotated_one_is_wrong(folder: Path) -> None:
    sample = next(
        sample for sample in mc_bench.load(folder).samples if len({b.image for b in sample.answer.boxes}) == 1
    )
    boxed = sample.answer.boxes[0].image
    for changed, refused in ((boxed, "size_mismatch"), (1 - boxed, None)):
        sizes = [tuple(size) for size in sample.extra["sizes"]]
        sizes[changed] = (50, 50)
        reply = Reply(written(truth(sample)), tuple(ImageSizes(size, size) for size in sizes))
        assert score_reply(sample, reply, BoxFormat.NORMALIZED, *RULES).refused == refused


def change(what: str, index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[what][index].update(fields)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data.pop("descriptions"), "lacks descriptions"),
        (lambda data: data["annotations"][0].pop("bbox"), r"annotations\[0\] lacks bbox"),
        (lambda data: data["images"][3].pop("width"), r"images\[3\] lacks width"),
        (change("images", 1, id=0), "'id' is 0, as of an earlier record"),
        (change("images", 0, width="112"), "width='112'"),
        (change("images", 0, height=0), "height=0"),
        (change("images", 0, file_name="../../x.jpg"), "leaves the image folder"),
        (change("descriptions", 0, images_id=[0]), "not the ids of two images"),
        (change("descriptions", 0, images_id=[0, [1]]), "not the ids of two images"),
        (change("descriptions", 0, images_id=[0, 99999]), "not the ids of two images"),
        (change("descriptions", 0, text_style="Poetic"), "text_style='Poetic'"),
        (change("descriptions", 0, text=None), "text=None"),
        (change("annotations", 0, text_id=40), "no description with this image"),
        (change("annotations", 0, text_id=[0]), "no description with this image"),
        (change("annotations", 0, category_id=9), "category_id=9 is no group"),
        (change("categories", 0, name="person"), "category_id=1 is no group"),
        (change("annotations", 0, bbox=[1, 2, 3]), r"bbox=\[1, 2, 3\]"),
        (change("annotations", 0, bbox=[1, 2, "3", 4]), "bbox="),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(
    damage: Callable[[dict[str, Any]], Any], named: str, folder: Path, tmp_path: Path
) -> None:
    data = json.loads((folder / FILE).read_text())
    damage(data)
    (tmp_path / "MC-Bench_images").mkdir()
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=named):
        mc_bench.load(tmp_path)


def test_images_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder mc-bench_images/"):
        mc_bench.load(tmp_path)


def test_a_box_in_0_to_1_drops_its_question(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / FILE).read_text())
    data["annotations"][0]["bbox"] = [0.1, 0.1, 0.5, 0.5]
    (tmp_path / "mc-bench_images").mkdir()
    (tmp_path / FILE).write_text(json.dumps(data))
    benchmark = mc_bench.load(tmp_path)
    assert len(benchmark.samples) == 41 and benchmark.dropped["box in 0-1, not pixels"] == 1


@pytest.mark.parametrize(
    ("label", "group"),
    [("group 2", 2), (" Group 12 ", 12), ("group3", 3), ("group 0", 1), ("group 2 people", 1), ("", 1), (None, 1)],
)
def test_the_label_names_the_group(label: str | None, group: int) -> None:
    assert group_of(label) == group


def test_the_real_annotations_are_read_whole(tmp_path: Path) -> None:
    if not (REAL / FILE).is_file():
        pytest.skip(f"the real annotations are not here: {REAL / FILE}")
    (tmp_path / "mc-bench_images").mkdir()
    (tmp_path / FILE).symlink_to(REAL / FILE)
    benchmark = mc_bench.load(tmp_path)
    data = json.loads((REAL / FILE).read_text())
    styles = Counter(description["text_style"] for description in data["descriptions"])
    assert Counter(sample.task for sample in benchmark.samples) == styles
    boxes = [one for sample in benchmark.samples for one in sample.answer.boxes]
    assert Counter(group_of(one.label) for one in boxes) == Counter(a["category_id"] for a in data["annotations"])
    assert sum(box_fault(one.box) is not None for one in boxes) == benchmark.dropped[OUTSIDE] == 1
    right = result_of([score(sample, written(truth(sample))) for sample in benchmark.samples])
    # That box has no area, so that its group never reaches recall 1: one of 101 points.
    share = Counter(group_of(one.label) for one in boxes)[1] / len(boxes)
    for numbers in (right, right["official"]):
        cell = numbers["averages"]["avg"]
        assert cell["score"] == pytest.approx(100 * (1 - share / 101), abs=0.1) and cell["score"] < 100
        assert cell["image_accuracy"] == 100.0
