"""Questions over two or three pictures that one to four boxes answer, as data: scenes, question, answers, reason.

`every_kind`, `every_colour` and `in_every_image` are trained. `every_shape` and `in_one_image` are not: they show
whether a policy has learnt to name images and boxes, or three wordings. Look-alikes make every picture necessary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datamodules.synthetic.puzzles import crowd_around, shuffled
from datamodules.synthetic.single_image import crowd, reading_order
from datamodules.synthetic.world import COLOURS, KINDS, SHAPES, Kind, Scene, Thing, random_scene

MAX_BOXES = 4
SCALE = (0.24, 0.4)  # smallest and largest side of a thing, as a share of the shorter side of the picture


@dataclass(frozen=True)
class MultiBoxPuzzle:
    """A question over several pictures and all the things that answer it."""

    task: str
    scenes: tuple[Scene, ...]  # one a picture
    question: str
    answers: tuple[tuple[int, Thing], ...]  # (index of the picture, thing), by picture and then from left to right
    reason: str  # beginning of the thinking text

    def thinking(self) -> str:
        """The thinking text: which thing in which image."""
        found = ", ".join(f"the {thing.kind.name} in image {image + 1}" for image, thing in self.answers)
        return f"{self.reason}: {found}."

    def content_hashes(self) -> frozenset[str]:
        """The hashes of all scenes, by which training and evaluation are kept apart."""
        return frozenset(scene.content_hash() for scene in self.scenes)


def _puzzle(
    rng: random.Random,
    task: str,
    pictures: Sequence[list[Kind]],
    question: str,
    reason: str,
    is_answer: Callable[[Kind], bool],
) -> MultiBoxPuzzle:
    """Place the things of each picture, and collect those that answer.

    Args:
        rng: source of randomness.
        task: name of the task.
        pictures: the kinds in each picture.
        question: the question's text.
        reason: beginning of the thinking text.
        is_answer: whether things of a kind answer the question.
    """
    scenes = tuple(random_scene(rng, shuffled(rng, kinds), scale=SCALE) for kinds in pictures)
    answers = tuple(
        (image, thing)
        for image, scene in enumerate(scenes)
        for thing in reading_order(scene.things)
        if is_answer(thing.kind)
    )
    return MultiBoxPuzzle(task, scenes, question, answers, reason)


def _counts(rng: random.Random) -> list[int]:
    """For two or three pictures, how many things of each answer: 0 to 2, and 1 to MAX_BOXES together."""
    while True:
        counts = [rng.choice((0, 1, 1, 2)) for _ in range(rng.choice((2, 3)))]
        if 1 <= sum(counts) <= MAX_BOXES:
            return counts


def every_kind(rng: random.Random) -> MultiBoxPuzzle:
    """All things of one kind, which a picture may hold twice or not at all, among look-alikes."""
    kind = rng.choice(KINDS)
    pictures = [[kind] * count + crowd_around(rng, kind)[: rng.choice((1, 2))] for count in _counts(rng)]
    question = rng.choice(("Find every {} in these images.", "Locate each {} in all images.")).format(kind.name)
    return _puzzle(rng, "every_kind", pictures, question, f"Every {kind.name}", lambda other: other == kind)


def _every(rng: random.Random, task: str, attribute: str, values: Sequence[str], noun: str) -> MultiBoxPuzzle:
    """All things that share a colour or a shape."""
    value = rng.choice(values)
    matching = [kind for kind in KINDS if getattr(kind, attribute) == value]
    others = [kind for kind in KINDS if getattr(kind, attribute) != value]
    pictures = [rng.sample(matching, count) + rng.sample(others, rng.choice((1, 2))) for count in _counts(rng)]
    name = noun.format(value)
    question = rng.choice(("Find every {} in these images.", "Locate each {} in all images.")).format(name)
    return _puzzle(rng, task, pictures, question, f"Every {name}", lambda kind: getattr(kind, attribute) == value)


def every_colour(rng: random.Random) -> MultiBoxPuzzle:
    """All things of one colour, of any shape."""
    return _every(rng, "every_colour", "colour", tuple(COLOURS), "{} object")


def every_shape(rng: random.Random) -> MultiBoxPuzzle:
    """All things of one shape, of any colour. (Not trained.)"""
    return _every(rng, "every_shape", "shape", SHAPES, "{}")


def in_every_image(rng: random.Random) -> MultiBoxPuzzle:
    """The one kind that all pictures share, in each of them. Each other kind is missing in one picture at least."""
    count = rng.choice((2, 3))
    shared, *decoys = crowd(rng, 1 + count)
    pictures = [[shared] + [decoy for other, decoy in enumerate(decoys) if other != k] for k in range(count)]
    question = rng.choice(
        (
            "Which object is in every image? Locate it in each of them.",
            "Find the object that all images share, in each image.",
        )
    )
    return _puzzle(rng, "in_every_image", pictures, question, "In every image", lambda kind: kind == shared)


def in_one_image(rng: random.Random) -> MultiBoxPuzzle:
    """The things of two pictures whose kind the other picture does not hold. (Not trained.)"""
    first, second = rng.choice(((0, 1), (1, 0), (1, 1), (1, 2), (2, 1)))
    kinds = crowd(rng, rng.choice((1, 2)) + first + second)
    alone = set(kinds[: first + second])
    both = kinds[first + second :]
    pictures = [kinds[:first] + both, kinds[first : first + second] + both]
    question = "Find the objects that are in only one of the two images."
    return _puzzle(rng, "in_one_image", pictures, question, "In one image only", lambda kind: kind in alone)


TRAINED: dict[str, Callable[[random.Random], MultiBoxPuzzle]] = {
    "every_kind": every_kind,
    "every_colour": every_colour,
    "in_every_image": in_every_image,
}
NOT_TRAINED: dict[str, Callable[[random.Random], MultiBoxPuzzle]] = {
    "every_shape": every_shape,
    "in_one_image": in_one_image,
}
