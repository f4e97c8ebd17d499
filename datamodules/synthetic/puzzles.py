"""A puzzle of the synthetic dataset, and functions that several tasks share: look-alikes, changes, movement."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from datamodules.samples.boxes import Box
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.thinking_texts import thinking_text
from datamodules.synthetic.world import (
    COLOURS,
    FILLS,
    KINDS,
    SHAPES,
    Kind,
    Scene,
    Thing,
    crop_scene,
    draw_scene,
    place,
    random_scene,
)


@dataclass(frozen=True)
class Puzzle:
    """A question over several pictures, with its answer and the reason for it."""

    task: str
    scenes: tuple[Scene, ...]  # one a picture
    question: str
    target: int  # index of the picture that holds the answer, from 0
    thing: Thing  # the answer
    reasons: tuple[str, ...]  # beginnings of the thinking text
    crops: tuple[Box | None, ...] = ()  # picture k shows this part of scenes[k] (unit xyxy); None or (): all of it
    region: Box | None = None  # the answer is this box (unit xyxy), and not that of `thing`
    info: str = ""  # MIG-Bench's field additional_info
    query: Thing | None = None  # the object in picture 0 that the question asks about, if any

    @property
    def box(self) -> Box:
        """The answer, unit xyxy of picture `target`."""
        return self.region or self.thing.box

    @property
    def label(self) -> str:
        """The name of the answer."""
        return self.thing.kind.name

    def picture(self, k: int) -> Image.Image:
        """Draw picture `k`."""
        crop = self.crops[k] if self.crops else None
        return draw_scene(self.scenes[k]) if crop is None else crop_scene(self.scenes[k], crop)

    def thinking(self, wording: int = 0) -> str:
        """The thinking text that leads to the answer."""
        return thinking_text(self.reasons, self.label, self.target, wording)

    def content_hashes(self) -> frozenset[str]:
        """The hashes of all scenes, by which training and evaluation are kept apart."""
        return frozenset(scene.content_hash() for scene in self.scenes)


def thing_of(scene: Scene, kind: Kind) -> Thing:
    """The first thing of this kind in a scene."""
    return next(thing for thing in scene.things if thing.kind == kind)


def box_text(box: Box) -> str:
    """The unit xyxy box in MIG-Bench's notation for questions, with numbers from 0 to 1000."""
    x0, y0, x1, y1 = (round(v * 1000) for v in box)
    return f"(<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>)"


def shuffled(rng: random.Random, kinds: list[Kind]) -> list[Kind]:
    """The kinds in random order, as a new list."""
    return rng.sample(kinds, len(kinds))


def crowd_around(rng: random.Random, kind: Kind) -> list[Kind]:
    """The look-alikes of `kind`, in random order: all kinds that share two of its three attributes."""
    near = [
        k
        for k in KINDS
        if k != kind and (k.shape == kind.shape) + (k.colour == kind.colour) + (k.fill == kind.fill) == 2
    ]
    return rng.sample(near, len(near))


def close_up(rng: random.Random, thing: Thing, size: tuple[int, int]) -> Box:
    """A unit xyxy box around a thing, with a small margin on every side and its edges on whole pixels.

    `size` is the (width, height) of the picture in pixels.
    """
    x0, y0, x1, y1 = thing.box
    width, height = size
    room_x, room_y = (x1 - x0) * rng.uniform(0.04, 0.14), (y1 - y0) * rng.uniform(0.04, 0.14)
    return (
        max(0, round((x0 - room_x) * width)) / width,
        max(0, round((y0 - room_y) * height)) / height,
        min(width, round((x1 + room_x) * width)) / width,
        min(height, round((y1 + room_y) * height)) / height,
    )


def change_one(
    rng: random.Random, size: tuple[int, int], scale: tuple[float, float]
) -> tuple[list[Thing], list[Thing], Thing]:
    """(things before, things after, the changed thing): two lists of things that differ in one thing.

    Args:
        rng: source of randomness.
        size: (width, height) of the pictures in pixels.
        scale: smallest and largest side of a thing, as a share of the shorter side of the picture.
    """
    kinds = crowd(rng, rng.choice((3, 3, 4)))
    scene = random_scene(rng, kinds, size, scale)
    *kept, last = scene.things
    if rng.random() < 0.5:  # the thing is new in the second list
        return list(kept), [*kept, last], last
    # The thing is replaced by a look-alike at the same place.
    other = next(kind for kind in crowd_around(rng, last.kind) if kind not in kinds)
    return [*kept, last], [*kept, replace(last, kind=other)], replace(last, kind=other)


def move_all(
    rng: random.Random, things: list[Thing], size: tuple[int, int], scale: tuple[float, float]
) -> list[Thing] | None:
    """The same kinds at other places and in other sizes; None if there is no room for them.

    Args:
        rng: source of randomness.
        things: the things to move.
        size: (width, height) of the picture in pixels.
        scale: smallest and largest side of a thing, as a share of the shorter side of the picture.
    """
    boxes: list[Box] = []
    for _ in things:
        box = place(rng, size, boxes, scale)
        if box is None:
            return None
        boxes.append(box)
    return [replace(thing, box=box) for thing, box in zip(things, boxes, strict=True)]


def drift(rng: random.Random, things: list[Thing], size: tuple[int, int]) -> list[Thing] | None:
    """The things after one small step each, inside the picture and without overlap; None if 40 tries fail.

    `size` is the (width, height) of the picture in pixels.
    """
    for _ in range(40):
        moved: list[Thing] = []
        for thing in things:
            x0, y0, x1, y1 = thing.box
            # A step of at most 12 % of the picture, by whole pixels.
            dx = round(rng.uniform(-0.12, 0.12) * size[0]) / size[0]
            dy = round(rng.uniform(-0.12, 0.12) * size[1]) / size[1]
            box = (x0 + dx, y0 + dy, x1 + dx, y1 + dy)
            inside = box[0] > 0 and box[1] > 0 and box[2] < 1 and box[3] < 1
            apart = all(
                box[0] >= o.box[2] or o.box[0] >= box[2] or box[1] >= o.box[3] or o.box[1] >= box[3] for o in moved
            )
            if not (inside and apart):
                break
            moved.append(replace(thing, box=box))
        if len(moved) == len(things):
            return moved
    return None


def sharing(rng: random.Random, kind: Kind, attribute: str) -> tuple[Kind, list[Kind]]:
    """(right, wrong): a kind that shares `attribute` with `kind`, and two or three kinds that do not.

    `attribute` is "shape" or "colour". The right kind differs from `kind` in the other one of these attributes. The
    first wrong kind shares that other attribute with `kind`, so a policy must know which attribute counts.
    """
    # All new shapes and colours differ from each other and from those of `kind`.
    shapes = rng.sample([s for s in SHAPES if s != kind.shape], 4)
    colours = rng.sample([c for c in COLOURS if c != kind.colour], 4)
    fills = rng.choices(FILLS, k=4)
    if attribute == "shape":
        right = Kind(kind.shape, colours[0], fills[0])
        wrong = [Kind(shapes[0], kind.colour, fills[1]), Kind(shapes[1], colours[1], fills[2])]
    else:
        right = Kind(shapes[0], kind.colour, fills[0])
        wrong = [Kind(kind.shape, colours[0], fills[1]), Kind(shapes[1], colours[1], fills[2])]
    if rng.random() < 0.5:
        wrong.append(Kind(shapes[2], colours[2], fills[3]))
    return right, wrong
