"""A folder of shards as a benchmark: its questions, its columns, and what is left out."""

import pickle
from pathlib import Path

import pytest

from datamodules.benchmarks.registry import benchmark_names, benchmark_rules, load_benchmark
from datamodules.benchmarks.shard_folders import shards_name
from datamodules.metrics.predictions import Reply
from datamodules.metrics.result_files import format_result, result_metrics
from datamodules.metrics.scoring import score_replies
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


def test_what_is_no_question_is_counted_and_named(tmp_path: Path) -> None:
    rows = [("track", BoxesAnswer((BOX, BOX)), {}), ("find", BOX, {}), ("track", BoxesAnswer((BOX,)), {})]
    folder = write(tmp_path / "kites", rows)
    benchmark = load_benchmark(str(folder), "")
    assert [sample.id for sample in benchmark.samples] == ["kites/1"]
    assert benchmark.dropped == {"several_answers (kites/0, kites/2)": 2}
    assert benchmark.averages == {"avg": ("find",)}
    with pytest.raises(ValueError, match=r"no question was found; dropped: .*kites/0"):
        load_benchmark(str(write(tmp_path / "tracks", rows[:1])), "")


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
