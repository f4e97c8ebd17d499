"""Single-image conversations for the pretraining of the nano base model: grounding, listing and describing.

A model that is trained on these grounds well in one image and has never seen two images, like the paper's base model.
Answers have Qwen2.5-VL's form, a list; their numbers are in the model's box format (`ImageSizes.to_model`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.samples.boxes import Box, BoxFormat, ImageSizes
from datamodules.synthetic.world import COLOURS, FILLS, KINDS, SHAPES, SIZES, Kind, Scene, Thing, random_scene

GROUNDING = (
    "Locate the {} in this image and output the bbox coordinates in JSON format.",
    "Where is the {} in this image? Output the bbox coordinates in JSON format.",
    "Give the bounding box of the {} in JSON format.",
    "Find the {} and output its bbox coordinates in JSON format.",
    "Please locate <|object_ref_start|>{}<|object_ref_end|> and output the bbox coordinates in JSON format.",
    "{}",
)
LISTING = (
    "Outline the position of each object and output all the coordinates in JSON format.",
    "Locate every object in this image and output the bbox coordinates in JSON format.",
)
DESCRIBING = ("Describe this image.", "What does this image show?", "Name the objects in this image.")
MARKED = ("Name the object marked with the red bounding box.", "What is inside the red bounding box?")
POINTED = ("Name the object at {}.", "What is at {} in this image?")


@dataclass(frozen=True)
class Turn:
    """One question about a picture, and its answer."""

    task: str
    question: str
    answer: str
    box: Box | None = None  # the true unit xyxy box of a grounding turn; None for other turns
    image: int = 0  # index of the picture


def crowd(rng: random.Random, count: int) -> list[Kind]:
    """`count` different kinds. Many share two attributes, so that a colour alone seldom identifies a thing."""
    kinds = [rng.choice(KINDS)]
    while len(kinds) < count:
        if rng.random() < 0.5:  # a kind that differs from an earlier one in a single attribute
            seed = rng.choice(kinds)
            choice = rng.randrange(3)
            kind = (
                Kind(rng.choice(SHAPES), seed.colour, seed.fill),
                Kind(seed.shape, rng.choice(tuple(COLOURS)), seed.fill),
                Kind(seed.shape, seed.colour, rng.choice(FILLS)),
            )[choice]
        else:
            kind = rng.choice(KINDS)
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def list_answer(things: Sequence[Thing], sizes: ImageSizes, box_format: BoxFormat) -> str:
    """The answer in Qwen2.5-VL's own form: a JSON list of boxes with labels, in a fence."""
    boxes = [{"bbox_2d": list(sizes.to_model(t.box, box_format)), "label": t.kind.name} for t in things]
    return "```json\n[" + ",\n".join(json.dumps(box) for box in boxes) + "]\n```"


def reading_order(things: Sequence[Thing]) -> list[Thing]:
    """The things from left to right, so that a description has only one correct order."""
    return sorted(things, key=lambda thing: thing.box[0] + thing.box[2])


def enumerate_names(things: Sequence[Thing]) -> str:
    """The names of the things from left to right, with commas between them."""
    return ", ".join(thing.kind.name for thing in reading_order(things))


def single_scene(rng: random.Random) -> Scene:
    """A scene with one to five things of mixed sizes. In one of eight scenes a red frame marks a thing."""
    low = rng.choice((0.2, 0.26, 0.32))  # smallest side of a thing, as a share of the shorter side of the picture
    scene = random_scene(rng, crowd(rng, rng.choice((1, 2, 3, 4, 4, 5, 5))), rng.choice(SIZES), (low, low + 0.18))
    return scene.with_frame(rng.choice(scene.things).box) if rng.random() < 0.125 else scene


def single_turns(
    rng: random.Random, scene: Scene, sizes: ImageSizes, box_format: BoxFormat, grounding: int
) -> list[Turn]:
    """The questions and answers about one scene.

    Args:
        rng: source of randomness.
        scene: the picture.
        sizes: its original and resized size.
        box_format: the format of the boxes in the answers.
        grounding: number of grounding turns, each about another thing; fewer if the scene has fewer things.
    """
    things = list(scene.things)
    turns = []
    # Always: grounding of single things, and a description of the picture.
    for thing in rng.sample(things, min(grounding, len(things))):
        question = rng.choice(GROUNDING).format(thing.kind.name)
        turns.append(Turn("grounding", question, list_answer([thing], sizes, box_format), thing.box))
    turns.append(Turn("describing", rng.choice(DESCRIBING), enumerate_names(things)))
    # Sometimes: a list of all boxes, or the name of the thing in a box that the question gives.
    if rng.random() < 0.1:
        answer = list_answer(reading_order(things), sizes, box_format)
        turns.append(Turn("listing", rng.choice(LISTING), answer))
    if rng.random() < 0.3:
        thing = rng.choice(things)
        box_text = str(list(sizes.to_model(thing.box, box_format)))
        turns.append(Turn("pointed", rng.choice(POINTED).format(box_text), thing.kind.name))
    # With a red frame: the name of the thing in it.
    if scene.frame is not None:
        marked = next(thing for thing in things if thing.box == scene.frame)
        turns.append(Turn("marked", rng.choice(MARKED), marked.kind.name))
    return turns
