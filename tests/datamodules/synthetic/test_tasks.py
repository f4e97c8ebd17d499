"""Every puzzle solved by brute force from its scenes and its question alone: one right answer, and no spare image.

`solve` is written from the questions' meaning and shares no code with the generator.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.samples.boxes import Box, box_fault
from datamodules.synthetic.puzzles import Puzzle
from datamodules.synthetic.tasks import GROUP_GROUNDING, SCALES, make_puzzle
from datamodules.synthetic.world import SIZES, Kind, Scene, Thing, draw_scene, encode_png
from experiments.nano.build_model import MAX_PIXELS, MIN_PIXELS
from tests.beside import SHARED

ROOT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("MIG_BENCH_JSON", SHARED / "data/MIG-Bench/MIG_data.json"))
NUM_PUZZLES = 150  # of each task
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
QUERY_BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
# What the reasoning questions ask for, by a word of theirs.
ATTRIBUTE_WORDS = {"shape": "shape", "formed": "shape", "colour": "colour", "paint": "colour"}

Candidate = tuple[int, Box]  # image and box


@cache
def puzzles(task: str, difficulty: str = "normal", count: int = NUM_PUZZLES) -> tuple[Puzzle, ...]:
    """The first `count` puzzles of a task, the same in every test."""
    return tuple(make_puzzle(random.Random(f"{task}:{difficulty}:{seed}"), task, difficulty) for seed in range(count))


@pytest.fixture(scope="module")
def real() -> list[dict]:
    if not REAL.is_file():
        pytest.skip(f"real MIG-Bench annotations not found: {REAL} (set MIG_BENCH_JSON)")
    return json.loads(REAL.read_text())


def numbered(question: str) -> int:
    """The 0-based image of 'in the Nth image'."""
    (number,) = re.findall(r"in the (\d+)th image", question)
    return int(number) - 1


def things_in(image: int, things: Iterable[Thing]) -> list[Candidate]:
    return [(image, thing.box) for thing in things]


def kinds_of(scene: Scene) -> set[Kind]:
    return {thing.kind for thing in scene.things}


def marked(question: str, scene: Scene) -> Thing:
    """The one thing of the first image that the question's box (per mille) surrounds; a red frame is around it too."""
    box = [int(number) / 1000 for number in QUERY_BOX.search(question).groups()]
    (thing,) = (t for t in scene.things if all(abs(a - b) <= 0.00051 for a, b in zip(t.box, box, strict=True)))
    assert scene.frame == thing.box
    return thing


def solve(task: str, question: str, scenes: Sequence[Scene | None]) -> list[Candidate]:
    """Everything that may be the answer, as far as the images that are not None tell."""
    first = scenes[0]
    if task == "common_object":
        target = numbered(question)
        others = [kinds_of(scene) for scene in scenes if scene is not None]
        return things_in(target, (t for t in scenes[target].things if all(t.kind in kinds for kinds in others)))
    if task == "diff":
        return things_in(1, (t for t in scenes[1].things if first is None or t not in first.things))
    if task == "view_diff":
        return things_in(1, (t for t in scenes[1].things if first is None or t.kind not in kinds_of(first)))
    if task == "refer_grounding":
        return things_in(1, (t for t in scenes[1].things if first is None or kinds_of(first) == {t.kind}))
    if task in ("multi_view", "object_tracking"):
        target = numbered(question)
        wanted = None if first is None else marked(question, first).kind
        return things_in(target, (t for t in scenes[target].things if wanted in (None, t.kind)))
    if task == "group_grounding":
        name = re.search(r"<\|object_ref_start\|>a (.+)<\|object_ref_end\|>", question)[1]
        seen = ((image, scene) for image, scene in enumerate(scenes) if scene is not None)
        return [(image, t.box) for image, scene in seen for t in scene.things if t.kind.name == name]
    if task == "reasoning":
        (attribute,) = {meant for word, meant in ATTRIBUTE_WORDS.items() if word in question}
        wanted = None if first is None else {getattr(kind, attribute) for kind in kinds_of(first)}
        return things_in(1, (t for t in scenes[1].things if wanted is None or {getattr(t.kind, attribute)} == wanted))
    assert task == "correspondence"
    framed = None if first is None else next(t for t in first.things if t.box == first.frame)
    return things_in(1, (t for t in scenes[1].things if framed is None or t.kind.shape == framed.kind.shape))


@pytest.mark.parametrize("difficulty", list(SCALES))
@pytest.mark.parametrize("task", [task for task in TASKS if task != "region"])
def test_each_puzzle_has_one_and_only_one_answer(task: str, difficulty: str) -> None:
    for puzzle in puzzles(task, difficulty, NUM_PUZZLES if difficulty == "normal" else 40):
        assert solve(task, puzzle.question, puzzle.scenes) == [(puzzle.target, puzzle.box)]


# Which images hold what the question starts from; the others only have to be told apart from the target.
CLUES = {
    "common_object": lambda puzzle: [k for k in range(len(puzzle.scenes)) if k != puzzle.target],
    "group_grounding": lambda puzzle: [],
} | {task: lambda puzzle: [0] for task in TASKS if task not in ("common_object", "group_grounding", "region")}


@pytest.mark.parametrize("task", [task for task in CLUES if task != "group_grounding"])
def test_without_any_image_of_clues_two_answers_are_possible(task: str) -> None:
    for puzzle in puzzles(task):
        assert CLUES[task](puzzle)
        for hidden in CLUES[task](puzzle):
            scenes = [None if k == hidden else scene for k, scene in enumerate(puzzle.scenes)]
            candidates = solve(task, puzzle.question, scenes)
            assert (puzzle.target, puzzle.box) in candidates
            assert len(candidates) >= 2


def test_every_image_of_group_grounding_holds_a_look_alike() -> None:
    for puzzle in puzzles("group_grounding"):
        (wanted,) = (t.kind for t in puzzle.scenes[puzzle.target].things if t.box == puzzle.box)
        for scene in puzzle.scenes:
            shared = [
                (kind.shape == wanted.shape) + (kind.colour == wanted.colour) + (kind.fill == wanted.fill)
                for kind in kinds_of(scene) - {wanted}
            ]
            assert max(shared) == 2
        hidden = [None if k == puzzle.target else scene for k, scene in enumerate(puzzle.scenes)]
        assert solve("group_grounding", puzzle.question, hidden) == []


def places_of(crop: np.ndarray, picture: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Every xyxy pixel box of `picture` whose pixels are those of `crop`, found by trying all places."""
    height, width = crop.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(picture, (height, width, 3))[:, :, 0]
    alike = (windows[:, :, 0, 0] == crop[0, 0]).all(-1)  # one pixel first, all of them where it fits
    return [
        (int(x), int(y), int(x) + width, int(y) + height)
        for y, x in np.argwhere(alike)
        if np.array_equal(windows[y, x], crop)
    ]


@pytest.mark.parametrize("difficulty", list(SCALES))
def test_just_one_place_of_the_source_looks_like_the_region_asked_for(difficulty: str) -> None:
    for puzzle in puzzles("region", difficulty, 30):
        source, *crops = (np.asarray(puzzle.picture(k)) for k in range(len(puzzle.scenes)))
        width, height = puzzle.scenes[0].size
        number = int(re.search(r"locate the (\d+)th region picture", puzzle.question)[1])
        found = [places_of(crop, source) for crop in crops]
        assert [len(places) for places in found] == [1] * len(crops)
        (place,) = found[number - 1]
        assert place == pytest.approx([v * size for v, size in zip(puzzle.box, (width, height) * 2, strict=True)])
        assert puzzle.target == 0
        # The other regions are other answers, so the number in the question counts.
        assert len({places[0] for places in found}) == len(crops)


def test_a_region_holds_the_whole_of_its_thing_and_of_no_other() -> None:
    for puzzle in puzzles("region"):
        for box in puzzle.crops[1:]:
            assert box_fault(box) is None
            whole = [
                thing
                for thing in puzzle.scenes[0].things
                if all(a <= b + 1e-9 for a, b in zip(box[:2], thing.box[:2], strict=True))
                and all(a >= b - 1e-9 for a, b in zip(box[2:], thing.box[2:], strict=True))
            ]
            assert len(whole) == 1
            assert box != puzzle.box or whole[0].kind.name == puzzle.label


def test_pictures_of_a_diff_puzzle_differ_in_the_answer_box_only() -> None:
    for puzzle in puzzles("diff"):
        before, after = (np.asarray(draw_scene(scene)) for scene in puzzle.scenes)
        width, height = puzzle.scenes[1].size
        x0, y0, x1, y1 = (round(v * size) for v, size in zip(puzzle.box, (width, height) * 2, strict=True))
        changed = (before != after).any(-1)
        assert changed[y0:y1, x0:x1].any()
        changed[y0:y1, x0:x1] = False
        assert not changed.any()


def test_frames_of_a_track_are_one_picture_with_small_steps() -> None:
    for puzzle in puzzles("object_tracking"):
        assert len(puzzle.scenes) == 6
        assert len({(scene.size, scene.background, scene.kinds) for scene in puzzle.scenes}) == 1
        for before, after in itertools.pairwise(puzzle.scenes):
            for a, b in zip(before.things, after.things, strict=True):
                assert max(abs(x - y) for x, y in zip(a.box, b.box, strict=True)) < 0.12 + 1 / 84
                # It moves and does not grow.
                sides = [(t.box[2] - t.box[0], t.box[3] - t.box[1]) for t in (a, b)]
                assert sides[0] == pytest.approx(sides[1])


def test_corresponding_things_share_the_shape_and_not_the_colour() -> None:
    for puzzle in puzzles("correspondence"):
        (framed,) = (t.kind for t in puzzle.scenes[0].things if t.box == puzzle.scenes[0].frame)
        (answer,) = (t.kind for t in puzzle.scenes[1].things if t.box == puzzle.box)
        assert framed.shape == answer.shape and framed.colour != answer.colour
        assert any(kind.colour == framed.colour for kind in kinds_of(puzzle.scenes[1]))  # colour misleads


@pytest.mark.parametrize("task", TASKS)
def test_things_never_overlap_or_leave_the_picture(task: str) -> None:
    for puzzle in puzzles(task):
        for scene in puzzle.scenes:
            width, height = scene.size
            boxes = [[v * s for v, s in zip(t.box, (width, height) * 2, strict=True)] for t in scene.things]
            for box in boxes:
                assert box == pytest.approx([round(value) for value in box])  # whole pixels, so boxes are tight
                assert box_fault(tuple(v / s for v, s in zip(box, (width, height) * 2, strict=True))) is None
                assert min(box[2] - box[0], box[3] - box[1]) > 4.5
            for a, b in itertools.combinations(boxes, 2):
                assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) > -1e-6


@pytest.mark.parametrize("task", [task for task in TASKS if task != "region"])
def test_the_answer_box_is_tight_around_the_drawn_thing(task: str) -> None:
    for puzzle in puzzles(task)[:40]:
        scene = puzzle.scenes[puzzle.target]
        without = replace(scene, things=tuple(thing for thing in scene.things if thing.box != puzzle.box))
        rows, columns = np.nonzero((np.asarray(draw_scene(scene)) != np.asarray(draw_scene(without))).any(-1))
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert drawn == pytest.approx([v * size for v, size in zip(puzzle.box, scene.size * 2, strict=True)])


@pytest.mark.parametrize(
    ("difficulty", "bounds", "middle"), [("easy", (15, 75), 36), ("normal", (9, 55), 26), ("hard", (3.5, 12), 8)]
)
def test_sizes_of_things_after_resizing(difficulty: str, bounds: tuple[float, float], middle: float) -> None:
    sides = []
    for task in TASKS:
        for puzzle in puzzles(task, difficulty, 40):
            width, height = puzzle.scenes[puzzle.target].size
            new_height, new_width = smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)
            for thing in puzzle.scenes[puzzle.target].things:
                x0, y0, x1, y1 = thing.box
                sides += [(x1 - x0) * new_width, (y1 - y0) * new_height]
    assert bounds[0] < min(sides) and max(sides) < bounds[1]
    assert np.median(sides) == pytest.approx(middle, rel=0.15)


@pytest.mark.parametrize("task", TASKS)
def test_pictures_come_in_every_size_and_number(task: str) -> None:
    numbers = {"common_object": {3, 4}, "multi_view": {2, 3, 4}, "object_tracking": {6}, "region": {2, 3, 4}}
    assert {len(p.scenes) for p in puzzles(task)} == numbers.get(task, {3, 4} if task == "group_grounding" else {2})
    assert {scene.size for p in puzzles(task) for scene in p.scenes} == set(SIZES)
    assert all(p.picture(0).size == p.scenes[0].size for p in puzzles(task)[:10])


@pytest.mark.parametrize("task", TASKS)
def test_targets_take_every_value_that_their_task_has(task: str) -> None:
    found = {puzzle.target for puzzle in puzzles(task)}
    expected = {"common_object": {0, 1, 2, 3}, "group_grounding": {0, 1, 2, 3}, "region": {0}, "multi_view": {1, 2, 3}}
    assert found == expected.get(task, set(range(1, 6)) if task == "object_tracking" else {1})


# The thinking texts, read back.
THINKING = re.compile(
    r"(?:(?P<reason>.+) is the (?P<name>[a-z ]+)\. (?:Find it in image|Locate it in picture) (?P<image>\d+)\."
    r"|So the (?P<name2>[a-z ]+): (?P<reason2>.+)\. It is in image (?P<image2>\d+)\.)"
)
# task -> what may be said of the answer. Each is what `solve` looks for, so it is true of the one answer.
REASONS = {
    "common_object": {"the only object in every image", "the object that all images share"},
    "diff": {"the object that only image 2 has", "what is different"},
    "view_diff": {"the real difference"},
    "refer_grounding": {"the object of image 1", "the same object in both images"},
    "multi_view": {"the marked object"},
    "object_tracking": {"the marked object"},
    "group_grounding": {"what the sentence describes"},
    "reasoning": {"what has the same shape", "what has the same colour"},
    "correspondence": {"the counterpart of the marked object"},
}


@pytest.mark.parametrize("task", TASKS)
def test_thinking_states_true_facts(task: str) -> None:
    for number, puzzle in enumerate(puzzles(task)):
        match = THINKING.fullmatch(puzzle.thinking(number))
        reason = (match["reason"] or match["reason2"]).lower()
        (region,) = re.findall(r"the (\d+)th region", puzzle.question) or [0]
        assert reason in REASONS.get(task, {f"what region {region} shows"})
        if task == "reasoning":
            (attribute,) = {meant for word, meant in ATTRIBUTE_WORDS.items() if word in puzzle.question}
            assert reason.endswith(attribute)
        assert (match["name"] or match["name2"]) == puzzle.label
        assert int(match["image"] or match["image2"]) - 1 == puzzle.target
        if task != "region":
            (answer,) = (t for t in puzzle.scenes[puzzle.target].things if t.box == puzzle.box)
            assert answer.kind.name == puzzle.label


@pytest.mark.parametrize("task", TASKS)
def test_thinking_comes_in_several_wordings(task: str) -> None:
    wordings = set()
    for number, puzzle in enumerate(puzzles(task)):
        text = puzzle.thinking(number)
        for kind in {kind for scene in puzzle.scenes for kind in scene.kinds}:
            text = text.replace(kind.name, "*")
        wordings.add(re.sub(r"\d+|(hollow )?\*(, (hollow )?\*)*", "#", text))
    assert len(wordings) >= 3


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_puzzles_and_pictures(task: str) -> None:
    first, again, other = (make_puzzle(random.Random(seed), task) for seed in ("a", "a", "b"))
    assert first is not again
    assert first == again != other
    pictures = [[encode_png(puzzle.picture(k)) for k in range(len(puzzle.scenes))] for puzzle in (first, again)]
    assert pictures[0] == pictures[1]
    assert first.content_hashes() == again.content_hashes()
    assert not first.content_hashes() & other.content_hashes()


def template(question: str) -> str:
    """The question without what differs between records of a task."""
    question = QUERY_BOX.sub("[box]", question)
    question = re.sub(r"<\|object_ref_start\|>.*?<\|object_ref_end\|>", "[phrase]", question, flags=re.DOTALL)
    return re.sub(r"\b\d+th\b", "[N]th", question)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "reasoning"])
def test_questions_have_the_real_benchmark_s_wording(task: str, real: list[dict]) -> None:
    expected = {template(record["question"]) for record in real if record["task"] == task}
    assert len(expected) == (len(GROUP_GROUNDING) if task == "group_grounding" else 1)
    assert {template(puzzle.question) for puzzle in puzzles(task)} == expected


def test_reasoning_questions_end_as_the_real_ones_and_repeat_in_additional_info(real: list[dict]) -> None:
    ending = " Find it and locate it in the second image. "
    records = [record for record in real if record["task"] == "reasoning"]
    assert records and all(record["question"].endswith(ending) for record in records)
    for puzzle in puzzles("reasoning"):
        assert puzzle.question == puzzle.info + ending  # as in the real file, but for one record
        assert "Image-1" in puzzle.info and "Image-2" in puzzle.info


def test_additional_info_is_there_for_the_same_tasks_as_in_the_real_file(real: list[dict]) -> None:
    for task in TASKS:
        expected = {record["additional_info"] != "" for record in real if record["task"] == task}
        assert {puzzle.info != "" for puzzle in puzzles(task)} == expected


def test_group_grounding_s_info_has_the_real_form_and_holds_the_answer(real: list[dict]) -> None:
    form = re.compile(r"It is in the (\w+) image\. <\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>\. ")
    assert all(form.fullmatch(record["additional_info"]) for record in real if record["task"] == "group_grounding")
    for puzzle in puzzles("group_grounding"):
        ordinal, *numbers = form.fullmatch(puzzle.info).groups()
        assert ORDINALS.index(ordinal) == puzzle.target
        assert [int(number) / 1000 for number in numbers] == pytest.approx(puzzle.box, abs=0.00051)
