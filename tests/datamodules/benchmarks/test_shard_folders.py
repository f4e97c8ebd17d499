"""A folder of shards as a benchmark: its questions, its columns, and what is left out."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.benchmarks.registry import benchmark_names, benchmark_rules, load_benchmark
from datamodules.benchmarks.shard_folders import shards_name
from datamodules.metrics.predictions import Prediction, Reply
from datamodules.metrics.result_files import format_result, result_metrics
from datamodules.metrics.scoring import rescore, score_replies, score_reply
from datamodules.samples.answer_text import AnswerForm, render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import (
    BoxAnswer,
    BoxesAnswer,
    ChoiceAnswer,
    ImagePart,
    LoadedSample,
    Sample,
    SampleError,
    TextPart,
)
from datamodules.streaming.shard_writer import ShardWriter
from lightning_modules.metrics.summary import summarise

BOX = BoxAnswer(0, (0.1, 0.2, 0.5, 0.6), "kite")
CHOICE = ChoiceAnswer("B", ("yes", "no"))
SIZES = (ImageSizes((100, 100), (100, 100)),)


def write(folder: Path, rows: list[tuple[str, object, dict]]) -> Path:
    """Shards of one sample a row: (task, answer, extra)."""
    with ShardWriter(folder, max_samples=3) as writer:
        for number, (task, answer, extra) in enumerate(rows):
            parts = (ImagePart(0), TextPart("Where is the kite?"))
            sample = Sample(f"kites/{number}", "kites", task, ("a.png",), parts, answer, extra=extra)
            writer.add(LoadedSample(sample, (f"image {number}".encode(),)))
    return folder


def answer(texts: list[str], benchmark) -> dict:
    """The summary of a benchmark whose questions are answered by these texts."""
    replies = {s.id: Reply(text, SIZES) for s, text in zip(benchmark.samples, texts, strict=True)}
    scored = score_replies(benchmark, benchmark.samples, replies, BoxFormat.NORMALIZED)
    result = summarise(scored, benchmark.rule, benchmark.official, benchmark.averages)
    assert benchmark_rules(benchmark.name, (p.column for p in scored)) == (
        benchmark.rule,
        benchmark.official,
        benchmark.averages,
    )
    return {"benchmark": benchmark.name} | result


def right(box: tuple[float, ...]) -> str:
    return f'<think>Here.</think><answer>{{"bbox_2d": {list(box)}, "label": "kite"}}</answer>'


def test_each_task_is_a_column_whatever_its_name_is(tmp_path: Path) -> None:
    tasks = ["find the kite", "日本", "avg", "find the kite", "a/b<c>"]
    folder = write(tmp_path / "kites", [(task, BOX, {}) for task in tasks])
    benchmark = load_benchmark(str(folder), "no such folder")
    result = answer([right(BOX.box)] * 3 + ["no box"] * 2, benchmark)
    scores = {name: cell["score"] for name, cell in result["columns"].items()}
    assert scores == {"find the kite": 50.0, "日本": 100.0, "avg (task)": 100.0, "a/b<c>": 0.0}
    assert result["averages"]["avg"]["score"] == 62.5 and set(result["averages"]) == {"avg"}
    assert result["official"]["averages"]["avg"]["score"] == 62.5
    assert result_metrics(result)[f"{benchmark.name}/avg"] == 62.5
    assert "日本" in format_result(result)


def test_facts_of_the_source_are_no_facts_of_a_benchmark(tmp_path: Path) -> None:
    folder = write(tmp_path / "kites", [("find", BOX, {"size": "large", "column": 3, "sizes": [[1, 2]]})])
    benchmark = load_benchmark(str(folder), "")
    assert answer([right(BOX.box)], benchmark)["averages"]["avg"]["score"] == 100.0
    assert benchmark.load(benchmark.samples[0]).images == (b"image 0",)


def named(*boxes: BoxAnswer) -> str:
    """An answer that names images, for a model that writes 0-1."""
    return render_boxes([ParsedBox(box.box, box.label, box.image + 1) for box in boxes], "t")


def test_answers_of_several_boxes_have_an_accuracy_and_f1(tmp_path: Path) -> None:
    other = BoxAnswer(BOX.image, (0.0, 0.0, 0.05, 0.05), "kite")
    both = BoxesAnswer((BOX, other))
    rows = [("track", both, {})] * 4 + [("find", BOX, {})] * 2
    benchmark = load_benchmark(str(write(tmp_path / "kites", rows)), "")
    texts = [named(BOX, other), named(other), named(other, BOX, BOX), "none", right(BOX.box), "none"]
    result = answer(texts, benchmark)
    track, find, avg = result["columns"]["track"], result["columns"]["find"], result["averages"]["avg"]
    assert track["score"] == 25.0 and find["score"] == 50.0 and avg["score"] == 37.5
    assert track["f1"] == pytest.approx(100 * (1 + 2 / 3 + 4 / 5) / 4), "of two true boxes"
    assert find["f1"] == 50.0 and avg["f1"] == pytest.approx((track["f1"] + 50.0) / 2)
    assert result["official"]["columns"]["track"]["f1"] == track["f1"]
    assert result_metrics(result)[f"{benchmark.name}/f1/track"] == track["f1"]
    assert format_result(result).splitlines()[0].endswith("F1")
    assert result["details"]["mean_iou"] == pytest.approx((1 / 4 + 1 / 2) / 2, abs=1e-3), "of the worst pairs"


def test_a_model_that_names_images_is_scored_by_them_on_questions_of_one_box_too(tmp_path: Path) -> None:
    """A box in the wrong image, or one box too many, is wrong, as in training."""
    benchmark = load_benchmark(str(write(tmp_path / "kites", [("find", BOX, {})] * 4 + [("ask", CHOICE, {})])), "")
    elsewhere, spare = replace(BOX, image=1), replace(BOX, box=(0.0, 0.0, 0.05, 0.05))
    texts = [named(BOX), named(elsewhere), named(BOX, spare), right(BOX.box), "B"]
    replies = {
        sample.id: Reply(text, SIZES * len(sample.images))
        for sample, text in zip(benchmark.samples, texts, strict=True)
    }
    given = benchmark, benchmark.samples, replies, BoxFormat.NORMALIZED
    by_form = {form: score_replies(*given, form) for form in AnswerForm}
    assert [one.correct for one in by_form[AnswerForm.ONE_BOX]] == [True] * 5
    # The last answer names no image. A question of one image has no other.
    assert [one.correct for one in by_form[AnswerForm.NAMED_IMAGE]] == [True, False, False, True, True]
    assert [one.f1 for one in by_form[AnswerForm.NAMED_IMAGE]] == [1.0, 0.0, pytest.approx(2 / 3), 1.0, None]
    published = replace(benchmark, image_counts=False)
    assert score_replies(published, *given[1:], AnswerForm.NAMED_IMAGE) == by_form[AnswerForm.ONE_BOX]


def test_a_scored_answer_of_several_boxes_is_read_from_its_file_again(tmp_path: Path) -> None:
    benchmark = load_benchmark(str(write(tmp_path / "kites", [("track", BoxesAnswer((BOX,)), {})])), "")
    (sample,) = benchmark.samples
    sizes = tuple(ImageSizes((10, 10), (10, 10)) for _ in sample.images)
    found = score_reply(sample, Reply(named(BOX), sizes), BoxFormat.NORMALIZED, benchmark.rule, benchmark.official)
    assert found.read == ((BOX.image, *BOX.box),) and found.f1 == 1.0 and found.correct and found.well_formed
    again = Prediction.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found == rescore(again, benchmark.rule, benchmark.official)
    assert (
        "f1"
        not in score_reply(
            replace(sample, answer=BOX), Reply("", sizes), BoxFormat.NORMALIZED, benchmark.rule, benchmark.official
        ).to_json()
    ), "records of other answers are as before"


def test_a_folder_without_a_question_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "kites", [("find", BOX, {})])
    (folder / "shard-00000.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no question was found; dropped: .*manifest_mismatch"):
        load_benchmark(str(folder), "")


def test_boxes_and_choices_may_lie_in_one_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "both", [("find", BOX, {}), ("pick", CHOICE, {}), ("pick", CHOICE, {})])
    result = answer([right(BOX.box), "B", "A"], load_benchmark(str(folder), ""))
    assert {name: cell["score"] for name, cell in result["columns"].items()} == {"find": 100.0, "pick": 50.0}
    assert result["format_rate"] == 100.0  # of the answers that are boxes
    assert result["details"] == {}  # an option has no IoU


def test_a_damaged_shard_leaves_its_samples_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "kites", [("find", BOX, {})] * 5)
    (folder / "shard-00001.tar").write_bytes(b"x")
    benchmark = load_benchmark(str(folder), "")
    assert len(benchmark.samples) == 3
    (reason,) = benchmark.dropped
    assert reason.startswith("manifest_mismatch (shard-00001.tar:0, shard-00001.tar:1)")


def test_an_image_that_goes_later_is_an_error_of_its_question(tmp_path: Path) -> None:
    folder = write(tmp_path / "kites", [("find", BOX, {})])
    benchmark = load_benchmark(str(folder), "")
    (folder / "shard-00000.tar").unlink()
    with pytest.raises(SampleError) as caught:
        benchmark.load(benchmark.samples[0])
    assert pickle.loads(pickle.dumps(caught.value)).rule == "manifest_mismatch"


def test_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(write(tmp_path / "kites", [("find", BOX, {})]).parent)
    assert benchmark_names("mig_bench,kites,data/kites/val") == ["mig_bench", "kites", "data/kites/val"]
    assert shards_name("kites") == shards_name(str(tmp_path / "kites") + "/") == f"shards-{tmp_path.name}-kites"
    with pytest.raises(ValueError, match=r"bench='mig_bnch' must be all or some of mig_bench.*folders of shards"):
        benchmark_names("mig_bnch")
    with pytest.raises(ValueError, match=r"no manifest\.json in data/kites/val"):
        load_benchmark("data/kites/val", "")
