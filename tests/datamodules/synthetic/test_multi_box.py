"""Synthetic questions with several boxes: solved by brute force, written as shards, encoded, and kept apart."""

import random
import re
from pathlib import Path

import pytest

from datamodules.benchmarks.registry import load_benchmark
from datamodules.encoding.encoder import Encoder
from datamodules.encoding.messages import NAMED_THINK_SUFFIX
from datamodules.multi_image import encode_for_training
from datamodules.samples.answer_text import AnswerForm, is_well_formed
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxesAnswer, SampleError
from datamodules.samples.scores import score_text
from datamodules.streaming.shard_reader import ShardReader
from datamodules.synthetic.multi_box.multi_box_tasks import MAX_BOXES, NOT_TRAINED, TRAINED
from datamodules.synthetic.multi_box.write_multi_box import build_multi_box, held_out_puzzle, training_puzzle
from experiments import generate_synthetic

TASKS = TRAINED | NOT_TRAINED


def solve(task: str, question: str, scenes) -> set:
    """(image, box) of every answer, from the question's words and the scenes alone."""
    things = [(image, thing) for image, scene in enumerate(scenes) for thing in scene.things]
    held = [{thing.kind for thing in scene.things} for scene in scenes]
    if task == "in_every_image":
        right = lambda image, kind: all(kind in kinds for kinds in held)  # noqa: E731
    elif task == "in_one_image":
        right = lambda image, kind: sum(kind in kinds for kinds in held) == 1  # noqa: E731
    else:
        asked = re.search("(?:every|each) (.+) in ", question)[1].removesuffix(" object")
        right = lambda image, kind: asked in (kind.name, kind.colour, kind.shape)  # noqa: E731
    return {(image, thing.box) for image, thing in things if right(image, thing.kind)}


@pytest.mark.parametrize("task", list(TASKS))
def test_the_answers_are_all_things_that_the_question_means(task: str) -> None:
    counts, images = set(), set()
    for seed in range(60):
        puzzle = TASKS[task](random.Random(seed))
        assert {(image, thing.box) for image, thing in puzzle.answers} == solve(task, puzzle.question, puzzle.scenes)
        assert [image for image, _ in puzzle.answers] == sorted(image for image, _ in puzzle.answers)
        assert 1 <= len(puzzle.answers) <= MAX_BOXES
        counts.add(len(puzzle.answers))
        images.add(len({image for image, _ in puzzle.answers}))
        assert all(f"image {image + 1}" in puzzle.thinking() for image, _ in puzzle.answers)
    assert len(counts) >= 2 and max(images) >= 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multi_box")
    generate_synthetic.build(str(root), 0, train_samples=12, eval_per_task=2, pool_samples=4, kind="multi_box")
    return root


def test_the_same_settings_write_the_same_shards(root: Path, tmp_path: Path) -> None:
    build_multi_box(str(tmp_path), 0, train_samples=12, eval_per_task=2, pool_samples=4)
    for path in sorted(root.rglob("*.tar")):
        assert (tmp_path / path.relative_to(root)).read_bytes() == path.read_bytes()
    assert len(list(root.rglob("*.tar"))) == 4


def test_training_never_sees_a_scene_of_the_evaluation() -> None:
    held_out = frozenset().union(*(held_out_puzzle(task, k).content_hashes() for task in TASKS for k in range(20)))
    for part in ("sft", "rl_pool"):
        for index in range(50):
            puzzle = training_puzzle(part, 0, index)
            assert puzzle.task in TRAINED and not puzzle.content_hashes() & held_out


def test_its_targets_earn_every_reward(root: Path, tiny_model_dir: Path) -> None:
    form = {"box_format": BoxFormat.ABSOLUTE_PIXELS, "style": "think", "label_images": True}
    limits = {"max_prompt_tokens": 4096, "max_completion_tokens": 4096}
    encoder = Encoder(str(tiny_model_dir), **form, **limits, with_target=True, answer_form="named_image")
    one_box = Encoder(str(tiny_model_dir), **form, **limits, with_target=True)
    reader, tasks = ShardReader(str(root / "shards" / "sft")), set()
    for number in range(reader.count):
        loaded = reader.read(number)
        item = encode_for_training(encoder, loaded)
        decode = encoder.processor.tokenizer.decode
        text = decode(item.completion_ids, skip_special_tokens=True)
        how = (item.sample.answer, item.image_sizes, BoxFormat.ABSOLUTE_PIXELS)
        score = score_text(text, *how, form=item.answer_form)
        assert score.is_right(0.5) and score.iou > 0.8 and is_well_formed(text, AnswerForm.NAMED_IMAGE)
        assert NAMED_THINK_SUFFIX in decode(item.input_ids)
        tasks.add(item.sample.task)
        with pytest.raises(SampleError, match="no_box_answer"):
            encode_for_training(one_box, loaded)
    assert tasks == set(TRAINED)
    assert "answer_form" in encoder.form() and "answer_form" not in one_box.form(), "old keys of one-box answers stay"


@pytest.mark.parametrize(("part", "tasks"), [("in_domain", TRAINED), ("out_of_domain", NOT_TRAINED)])
def test_the_held_out_shards_are_a_benchmark_whose_columns_are_the_tasks(root: Path, part: str, tasks: dict) -> None:
    benchmark = load_benchmark(str(root / "shards" / part), "")
    assert set(benchmark.averages["avg"]) == set(tasks) and len(benchmark.samples) == 2 * len(tasks)
    assert all(isinstance(sample.answer, BoxesAnswer) for sample in benchmark.samples) and not benchmark.dropped
