"""The synthetic dataset on disk: MIG-Bench's own fields, apart from training, and the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from datamodules.benchmarks.mig_bench import TASKS, load_files, load_mig_bench
from datamodules.encoding.messages import PromptStyle, build_messages, target_text
from datamodules.images.image_files import load_images
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxPart, ImagePart, LoadedSample, TextPart
from datamodules.streaming.manifest import read_manifest
from datamodules.synthetic.write_samples import (
    MIXTURE,
    POOL_DIFFICULTY,
    VALIDATION,
    benchmark_puzzle,
    build_nano,
    training_puzzle,
    training_samples,
    write_benchmark,
)

PER_TASK = 8
FIELDS = ("task", "images", "question", "answer", "additional_info", "need_format")


def contents(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, frozenset[str]]:
    root = tmp_path_factory.mktemp("nano")
    return root, write_benchmark(root, PER_TASK)


@pytest.fixture(scope="module")
def records(benchmark: tuple[Path, frozenset[str]]) -> list[dict]:
    return json.loads((benchmark[0] / "MIG-Bench/MIG_data.json").read_text())


def test_records_have_the_real_benchmark_s_six_fields(records: list[dict]) -> None:
    assert len(records) == PER_TASK * len(TASKS)
    for record in records:
        assert tuple(record) == FIELDS
        assert len(record["answer"]) == 4 and all(round(v, 3) == v for v in record["answer"])
        assert all(name.startswith("./MIG-Bench/images/") for name in record["images"])
        assert record["need_format"] == (record["task"] not in ("group_grounding", "object_tracking"))
        assert (record["additional_info"] != "") == (record["task"] in ("group_grounding", "reasoning"))


def test_the_real_loader_reads_it_and_finds_each_target(benchmark: tuple[Path, frozenset[str]]) -> None:
    root, _ = benchmark
    benchmark_files = load_files(root / "MIG-Bench/MIG_data.json", root)
    samples = benchmark_files.samples
    assert not benchmark_files.dropped
    for position, sample in enumerate(samples):
        puzzle = benchmark_puzzle(TASKS[position // PER_TASK], position % PER_TASK)
        assert sample.task == puzzle.task
        assert sample.answer.image == puzzle.target
        assert sample.answer.box == pytest.approx(puzzle.box, abs=0.00051)
        pictures = [Image.open(io.BytesIO(data)) for data in load_images(sample, root).images]
        assert [picture.size for picture in pictures] == [puzzle.picture(k).size for k in range(len(puzzle.scenes))]
        boxes = [part for part in sample.messages if isinstance(part, BoxPart)]
        assert len(boxes) == (puzzle.task in ("multi_view", "object_tracking"))
        assert all(part.image == 0 and part.box == pytest.approx(puzzle.query.box, abs=0.00051) for part in boxes)


def test_the_answer_in_additional_info_reaches_no_prompt(
    benchmark: tuple[Path, frozenset[str]], records: list[dict]
) -> None:
    samples = load_mig_bench(benchmark[0] / "MIG-Bench/MIG_data.json")
    checked = 0
    for sample, record in zip(samples, records, strict=True):
        if sample.task != "group_grounding":
            continue
        numbers = record["additional_info"].split("<|box_start|>")[1].split("<|box_end|>")[0]
        sentence = record["additional_info"].split(".")[0]
        image_sizes = [ImageSizes((100, 100), (112, 112))] * len(sample.images)
        for style in PromptStyle:
            for box_format in BoxFormat:
                text = json.dumps(build_messages(sample, image_sizes, box_format, style))
                assert numbers not in text and sentence not in text
                assert record["question"].split(" <|")[0] in text
                checked += 1
        assert numbers not in json.dumps(sample.to_json()) and sentence not in json.dumps(sample.to_json())
    assert checked == PER_TASK * len(PromptStyle) * len(BoxFormat)


def test_a_benchmark_puzzle_depends_on_task_and_number_only() -> None:
    assert benchmark_puzzle("diff", 3) == benchmark_puzzle("diff", 3) != benchmark_puzzle("diff", 4)


def test_training_and_evaluation_share_no_scene(benchmark: tuple[Path, frozenset[str]]) -> None:
    hashes = set(benchmark[1])
    assert len(hashes) > PER_TASK * len(TASKS)
    for task in TASKS:
        for index in range(10):
            hashes |= benchmark_puzzle(task, index, VALIDATION).content_hashes()
    for part in ("sft", "rl_pool"):
        for index in range(60):
            assert not training_puzzle(part, 0, index)[2] & hashes


def test_the_validation_questions_are_others_than_the_benchmark_s(
    tmp_path: Path, benchmark: tuple[Path, frozenset[str]]
) -> None:
    root, hashes = benchmark
    assert not write_benchmark(tmp_path / "validation", PER_TASK, VALIDATION) & hashes
    validation = load_files(tmp_path / "validation/MIG-Bench/MIG_data.json", tmp_path / "validation")
    samples = validation.samples
    assert not validation.dropped and len(samples) == PER_TASK * len(TASKS)
    assert [load_images(sample, tmp_path / "validation").images for sample in samples] != [
        load_images(sample, root).images for sample in load_mig_bench(root / "MIG-Bench/MIG_data.json")
    ]


def test_a_training_puzzle_with_an_excluded_scene_is_dropped_and_replaced() -> None:
    excluded = training_puzzle("sft", 0, 2)[2]
    names = [loaded.sample.id for loaded in training_samples("sft", 0, 5, excluded)]
    assert names == [f"nano/sft/0/{index}" for index in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize(("part", "difficulties"), [("sft", {"normal"}), ("rl_pool", set(POOL_DIFFICULTY))])
def test_training_samples_are_sound(part: str, difficulties: set[str]) -> None:
    tasks, found = set(), set()
    for index in range(120):
        sample, images, _ = training_puzzle(part, 1, index)
        LoadedSample(type(sample).from_json(json.loads(json.dumps(sample.to_json()))), images)  # strict boxes
        sizes = [Image.open(io.BytesIO(data)).size for data in images]
        assert len(sizes) == len(sample.images) == sum(isinstance(part, ImagePart) for part in sample.messages)
        image_sizes = [ImageSizes(size, size) for size in sizes]
        assert sample.answer.label in target_text(sample, image_sizes, BoxFormat.ABSOLUTE_PIXELS, PromptStyle.THINK)
        tasks.add(sample.task)
        found.add(sample.extra["difficulty"])
    assert tasks == set(MIXTURE)
    assert found == difficulties


def test_seeds_and_parts_differ() -> None:
    ids = {training_puzzle(part, seed, 0)[1] for part in ("sft", "rl_pool") for seed in (0, 1)}
    assert len(ids) == 4


def test_equal_seeds_give_equal_bytes_and_old_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a/shards/sft").mkdir(parents=True)
    (tmp_path / "a/shards/sft/left.tar.partial").write_bytes(b"interrupted")
    build_nano(str(tmp_path / "a"), seed=3, train_samples=12, eval_per_task=1, validation_per_task=2, pool_samples=5)
    build_nano(str(tmp_path / "b"), seed=3, train_samples=12, eval_per_task=1, validation_per_task=2, pool_samples=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert read_manifest(tmp_path / "a/shards/sft")["count"] == 12
    assert read_manifest(tmp_path / "a/shards/rl_pool")["count"] == 5
    build_nano(str(tmp_path / "b"), seed=4, train_samples=12, eval_per_task=1, validation_per_task=2, pool_samples=5)
    other = contents(tmp_path / "b")
    same = {name for name, digest in contents(tmp_path / "a").items() if other.get(name) == digest}
    assert any(name.endswith(".tar") for name in other) and not any(name.endswith(".tar") for name in same)
    assert {name for name in other if name.startswith("MIG-Bench")} == {n for n in same if n.startswith("MIG-Bench")}


def test_single_image_questions_name_a_thing_or_give_its_box_never_both() -> None:
    singles = [sample for k in range(400) if (sample := training_puzzle("sft", 0, k)[0]).task == "single"]
    pointing = 0
    for sample in singles:
        text = "".join(part.text for part in sample.messages if isinstance(part, TextPart))
        boxes = [part.box for part in sample.messages if isinstance(part, BoxPart)]
        assert boxes in ([], [sample.answer.box])
        assert (sample.answer.label in text) == (not boxes), text
        pointing += bool(boxes)
    assert len(singles) > 20 and 0.25 < pointing / len(singles) < 0.75


def test_every_thinking_text_names_the_object_and_its_image() -> None:
    for index in range(500):
        sample = training_puzzle("sft", 0, index)[0]
        assert sample.answer.label in sample.thinking
        assert re.findall(r"(?:image|picture) (\d)", sample.thinking)[-1] == str(sample.answer.image + 1)


def test_a_thinking_text_s_wording_follows_from_the_question_s() -> None:
    words: dict[tuple[str, str], set[str]] = {}
    for index in range(2000):
        sample = training_puzzle("sft", 0, index)[0]
        question = "".join(part.text for part in sample.messages if isinstance(part, TextPart))
        if sample.task != "single":
            text = re.sub(r"\d+", "#", sample.thinking.replace(sample.answer.label, "*"))
            question = re.sub(r"\d+|first|second|third|fourth|fifth", "#", question)
            words.setdefault((sample.task, question), set()).add(text)
    assert all(len(texts) == 1 for texts in words.values()), words
    assert len({text for texts in words.values() for text in texts}) >= 15


def test_some_referring_questions_give_the_box_of_the_object_in_image_1_and_never_that_of_the_answer() -> None:
    count = 0
    for index in range(300):
        sample = training_puzzle("sft", 0, index)[0]
        boxes = [part for part in sample.messages if isinstance(part, BoxPart)]
        if boxes and sample.task != "single":
            assert sample.task == "refer_grounding" and sample.answer.image == 1
            (part,) = boxes
            assert part.image == 0 and part.box != sample.answer.box
            count += 1
    assert count > 10
