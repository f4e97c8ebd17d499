"""Single-image turns, checked against the scene that they are about."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from datamodules.samples.answer_text import ParsedAnswer, parse_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.synthetic.single_image import GROUNDING, MARKED, POINTED, Turn, crowd, single_scene, single_turns
from datamodules.synthetic.world import Scene, Thing
from experiments.nano.build_model import MAX_PIXELS, MIN_PIXELS

NUM_SCENES = 300


def sizes_of(scene: Scene) -> ImageSizes:
    width, height = scene.size
    return ImageSizes(scene.size, smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)[::-1])


def conversation(seed: int, box_format: BoxFormat = BoxFormat.ABSOLUTE_PIXELS) -> tuple[Scene, ImageSizes, list[Turn]]:
    rng = random.Random(seed)
    scene = single_scene(rng)
    return scene, sizes_of(scene), single_turns(rng, scene, sizes_of(scene), box_format, 3)


def turns_of(task: str) -> Iterator[tuple[Scene, ImageSizes, Turn]]:
    found = 0
    for seed in range(NUM_SCENES):
        scene, sizes, turns = conversation(seed)
        for turn in turns:
            if turn.task == task:
                found += 1
                yield scene, sizes, turn
    assert found > 10


def left_to_right(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda thing: (thing.box[0] + thing.box[2]) / 2)


def name_asked(question: str, templates: tuple[str, ...]) -> str:
    """What stands in the braces of the one template that fits best (the shortest filling)."""
    patterns = [re.escape(template).replace(r"\{\}", "(.*)") for template in templates]
    return min((m[1] for m in (re.fullmatch(p, question) for p in patterns) if m), key=len)


def test_scenes_hold_one_to_five_different_things_and_some_a_frame() -> None:
    scenes = [single_scene(random.Random(seed)) for seed in range(NUM_SCENES)]
    assert set(Counter(len(scene.things) for scene in scenes)) == {1, 2, 3, 4, 5}
    assert all(len(set(scene.kinds)) == len(scene.kinds) for scene in scenes)
    framed = [scene for scene in scenes if scene.frame is not None]
    assert NUM_SCENES / 16 < len(framed) < NUM_SCENES / 4
    assert all(sum(thing.box == scene.frame for thing in scene.things) == 1 for scene in framed)
    assert len({scene.content_hash() for scene in scenes}) == NUM_SCENES


def test_things_of_a_crowd_often_share_attributes() -> None:
    shared = 0
    for seed in range(200):
        colours = [kind.colour for kind in crowd(random.Random(seed), 4)]
        shared += len(set(colours)) < 4
    assert shared > 120


def test_a_grounding_answer_is_the_box_of_the_one_thing_asked_for() -> None:
    for scene, sizes, turn in turns_of("grounding"):
        (thing,) = (t for t in scene.things if t.kind.name == name_asked(turn.question, GROUNDING))
        assert turn.box == thing.box
        answer = parse_answer(turn.answer)
        assert isinstance(answer, ParsedAnswer)
        (box,) = answer.boxes
        assert box.label == thing.kind.name
        for value, true, size in zip(box.values, thing.box, sizes.resized * 2, strict=True):
            assert abs(value - true * size) <= 1  # half a pixel of rounding; the last pixel is the highest number


def test_descriptions_name_all_things_from_left_to_right() -> None:
    for scene, _, turn in turns_of("describing"):
        assert turn.answer.split(", ") == [thing.kind.name for thing in left_to_right(scene)]


def test_listings_hold_every_box_from_left_to_right() -> None:
    for scene, sizes, turn in turns_of("listing"):
        boxes = json.loads(turn.answer.removeprefix("```json\n").removesuffix("\n```"))
        assert [box["label"] for box in boxes] == [thing.kind.name for thing in left_to_right(scene)]
        for box, thing in zip(boxes, left_to_right(scene), strict=True):
            assert tuple(box["bbox_2d"]) == sizes.to_model(thing.box, BoxFormat.ABSOLUTE_PIXELS)


def test_a_pointed_question_names_the_thing_of_its_box() -> None:
    for scene, sizes, turn in turns_of("pointed"):
        values = tuple(json.loads(name_asked(turn.question, POINTED)))
        (thing,) = (t for t in scene.things if sizes.to_model(t.box, BoxFormat.ABSOLUTE_PIXELS) == values)
        assert turn.answer == thing.kind.name


def test_a_marked_question_names_the_framed_thing() -> None:
    for scene, _, turn in turns_of("marked"):
        assert turn.question in MARKED
        (thing,) = (t for t in scene.things if t.box == scene.frame)
        assert turn.answer == thing.kind.name


@pytest.mark.parametrize("box_format", list(BoxFormat))
def test_answers_speak_the_convention_asked_for(box_format: BoxFormat) -> None:
    _, sizes, turns = conversation(3, box_format)
    for turn in turns:
        if turn.task == "grounding":
            assert parse_answer(turn.answer).boxes[0].values == sizes.to_model(turn.box, box_format)


def test_no_turn_speaks_of_a_second_image() -> None:
    for seed in range(NUM_SCENES):
        for turn in conversation(seed)[2]:
            assert not re.search(r"images|second|[Ii]mage[- ]\d|both|Picture", turn.question + turn.answer)


def test_equal_seeds_give_equal_turns() -> None:
    assert conversation(11) == conversation(11)
    assert conversation(11) != conversation(12)
