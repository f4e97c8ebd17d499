"""Conversations about one picture among several, for the third stage of the nano base model's pretraining.

The paper's base model is pretrained on interleaved images: it can look at "picture 3" when it is told to. Every
question here is about a single picture that it names. No question compares pictures, and none has the wording or the
answer form of the ten MIG-Bench tasks (tests/datamodules/synthetic/test_interleaved.py). So nothing that RL is to teach
is taught here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.synthetic.single_image import Turn, crowd, enumerate_names, list_answer, reading_order
from datamodules.synthetic.thinking_texts import ORDINALS
from datamodules.synthetic.world import SIZES, Scene, Thing, random_scene

MOST_PICTURES = 6
# {0}: name of the object, {k}: number of the picture from 1, {nth}: the same as a word.
GROUNDING = (
    "Locate the {0} in picture {k} and output the bbox coordinates in JSON format.",
    "Where is the {0} in image {k}? Output the bbox coordinates in JSON format.",
    "Give the bounding box of the {0} in Image-{k} in JSON format.",
    "Look at the {nth} picture. Find the {0} and output its bbox coordinates in JSON format.",
    "Please locate <|object_ref_start|>{0}<|object_ref_end|> in the {nth} image and output the bbox coordinates.",
    "Picture {k}: {0}",
    "{0}: output its bbox coordinates in image {k}.",
    "The {nth} image shows a {0}. Output its bbox coordinates in JSON format.",
)
LISTING = (
    "Locate every object in picture {k} and output the bbox coordinates in JSON format.",
    "Outline the position of each object in the {nth} image and output all the coordinates in JSON format.",
)
DESCRIBING = (
    "Describe picture {k}.",
    "What does the {nth} image show?",
    "Name the objects in Image-{k}.",
    "What is in image {k}?",
)
POINTED = ("Name the object at {0} in picture {k}.", "What is at {0} in the {nth} image?")
MARKED = ("Name the object marked with a red box in picture {k}.", "What does the red box in the {nth} image mark?")
# Later turns of a conversation, about the picture of the turns before.
ALSO_GROUNDING = ("And the {0}?", "Where is the {0} there?", "Now locate the {0} in the same picture.")
ALSO_DESCRIBING = ("What else does it show? Name all its objects.", "Name all objects of this picture.")


def interleaved_scenes(rng: random.Random) -> tuple[Scene, ...]:
    """Two to six pictures with one to four things each.

    The pictures share kinds: the thing that a question names is often in other pictures too, at another place. So the
    number of the picture has to be read.
    """
    count = rng.choice((2, 2, 3, 3, 4, 5, 6))
    kinds = crowd(rng, rng.choice((4, 5, 6)))
    scenes = []
    for _ in range(count):
        low = rng.choice((0.22, 0.28, 0.34))  # smallest side of a thing, as a share of the shorter side of the picture
        shown = rng.sample(kinds, rng.choice((1, 2, 3, 3, 4)))
        scenes.append(random_scene(rng, shown, rng.choice(SIZES), (low, low + 0.16)))
    if rng.random() < 0.25:
        k = rng.randrange(count)
        scenes[k] = scenes[k].with_frame(rng.choice(scenes[k].things).box)
    return tuple(scenes)


def interleaved_turns(
    rng: random.Random,
    scenes: Sequence[Scene],
    sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    grounding: int,
) -> list[tuple[Turn, ...]]:
    """Conversations about these pictures; each is a tuple of turns, of which the later ones go on about its picture.

    Args:
        rng: source of randomness.
        scenes: the pictures.
        sizes: the original and resized size of each picture.
        box_format: the format of the boxes in the answers.
        grounding: number of grounding conversations. The first one has a single turn.
    """

    def ask(wordings: Sequence[str], k: int, name: str = "") -> str:
        return rng.choice(wordings).format(name, k=k + 1, nth=ORDINALS[k])

    def locate(wordings: Sequence[str], k: int, thing: Thing) -> Turn:
        answer = list_answer([thing], sizes[k], box_format)
        return Turn("grounding", ask(wordings, k, thing.kind.name), answer, thing.box, k)

    def describe(wordings: Sequence[str], k: int) -> Turn:
        return Turn("describing", ask(wordings, k), enumerate_names(scenes[k].things), image=k)

    conversations: list[tuple[Turn, ...]] = []
    # Always: grounding of single things. A part of the conversations goes on about another thing of the same picture.
    asked: set[tuple[int, Thing]] = set()
    for number in range(grounding):
        k, first = _another(rng, scenes, asked)
        asked.add((k, first))
        others = [thing for thing in scenes[k].things if thing != first]
        turns = [locate(GROUNDING, k, first)]
        if number > 0 and others and rng.random() < 0.4:
            turns.append(locate(ALSO_GROUNDING, k, rng.choice(others)))
        conversations.append(tuple(turns))
    # Always: descriptions of two pictures. After some of them, one of the things is located.
    for k in rng.sample(range(len(scenes)), 2):
        turns = [describe(DESCRIBING, k)]
        if rng.random() < 0.5:
            turns.append(locate(ALSO_GROUNDING, k, rng.choice(scenes[k].things)))
        conversations.append(tuple(turns))
    # Sometimes: one thing, then all things of its picture.
    if rng.random() < 0.2:
        k = rng.randrange(len(scenes))
        conversations.append((locate(GROUNDING, k, rng.choice(scenes[k].things)), describe(ALSO_DESCRIBING, k)))
    # Sometimes: a list of all boxes of a picture, or the name of the thing in a box that the question gives.
    if rng.random() < 0.15:
        k = rng.randrange(len(scenes))
        answer = list_answer(reading_order(scenes[k].things), sizes[k], box_format)
        conversations.append((Turn("listing", ask(LISTING, k), answer, image=k),))
    if rng.random() < 0.3:
        k = rng.randrange(len(scenes))
        thing = rng.choice(scenes[k].things)
        box_text = str(list(sizes[k].to_model(thing.box, box_format)))
        conversations.append((Turn("pointed", ask(POINTED, k, box_text), thing.kind.name, image=k),))
    # With a red frame: the name of the thing in it.
    for k, scene in enumerate(scenes):
        if scene.frame is not None:
            marked = next(thing for thing in scene.things if thing.box == scene.frame)
            conversations.append((Turn("marked", ask(MARKED, k), marked.kind.name, image=k),))
    return conversations


def _another(rng: random.Random, scenes: Sequence[Scene], asked: set[tuple[int, Thing]]) -> tuple[int, Thing]:
    """A picture and a thing in it for the next grounding question.

    Often it is a thing that was asked about before, in another picture. Two questions that differ in the number of the
    picture alone have different answers, so the number has to be read.
    """
    things = [(k, thing) for k, scene in enumerate(scenes) for thing in scene.things]
    kinds = {thing.kind for _, thing in asked}
    same = [(k, thing) for k, thing in things if thing.kind in kinds and (k, thing) not in asked]
    return rng.choice(same if same and rng.random() < 0.5 else things)
