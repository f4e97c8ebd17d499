"""What a puzzle of the nano world is, and the moves that several tasks share: look-alikes, changes, drift."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from datamodules.samples.boxes import Box
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.thinking_texts import thorough_thinking
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
    """A question over several pictures. Picture k is `scenes[k]`, or its `crops[k]` part where that is a box.

    `target` is the 0-based image of the answer `box` (0-1 of that image); `query` the thing asked about in image 0,
    where there is one; `reasons` begin the thinking text; `info` is what MIG-Bench keeps in additional_info.
    """

    task: str
    scenes: tuple[Scene, ...]
    crops: tuple[Box | None, ...]
    question: str
    target: int
    box: Box
    label: str
    reasons: tuple[str, ...]
    info: str = ""
    query: Thing | None = None

    def picture(self, k: int) -> Image.Image:
        crop = self.crops[k]
        return draw_scene(self.scenes[k]) if crop is None else crop_scene(self.scenes[k], crop)

    def thinking(self, wording: int = 0) -> str:
        return thorough_thinking(self.reasons, self.label, self.target, wording)

    def content_hashes(self) -> frozenset[str]:
        return frozenset(scene.content_hash() for scene in self.scenes)


def build_puzzle(
    task: str,
    scenes: list[Scene],
    question: str,
    target: int,
    thing: Thing,
    reasons: tuple[str, ...],
    *,
    crops: tuple[Box | None, ...] | None = None,
    box: Box | None = None,
    info: str = "",
    query: Thing | None = None,
) -> Puzzle:
    """Puzzle whose answer is `thing`, in whole scenes at its own box unless `crops` and `box` say otherwise."""
    return Puzzle(
        task=task,
        scenes=tuple(scenes),
        crops=crops or (None,) * len(scenes),
        question=question,
        target=target,
        box=box or thing.box,
        label=thing.kind.name,
        reasons=reasons,
        info=info,
        query=query,
    )


def thing_of(scene: Scene, kind: Kind) -> Thing:
    """The first thing of a kind that a scene holds."""
    return next(thing for thing in scene.things if thing.kind == kind)


def box_text(box: Box) -> str:
    """A box in a question, per mille, as MIG-Bench writes it."""
    x0, y0, x1, y1 = (round(v * 1000) for v in box)
    return f"(<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>)"


def shuffled(rng: random.Random, kinds: list[Kind]) -> list[Kind]:
    return rng.sample(kinds, len(kinds))


def crowd_around(rng: random.Random, kind: Kind) -> list[Kind]:
    """All kinds that share two of three attributes with `kind`, in random order."""
    near = [
        k
        for k in KINDS
        if k != kind and (k.shape == kind.shape) + (k.colour == kind.colour) + (k.fill == kind.fill) == 2
    ]
    return rng.sample(near, len(near))


def close_up(rng: random.Random, thing: Thing, size: tuple[int, int]) -> Box:
    """A box around a thing with a little room on every side, on whole pixels of a picture of `size`."""
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
    """Two lists of things for pictures of `size` that differ in one: replaced by another kind, or new in the second."""
    kinds = crowd(rng, rng.choice((3, 3, 4)))
    scene = random_scene(rng, kinds, size, scale)
    *kept, last = scene.things
    if rng.random() < 0.5:
        return list(kept), [*kept, last], last
    other = next(kind for kind in crowd_around(rng, last.kind) if kind not in kinds)
    return [*kept, last], [*kept, replace(last, kind=other)], replace(last, kind=other)


def move_all(
    rng: random.Random, things: list[Thing], size: tuple[int, int], scale: tuple[float, float]
) -> list[Thing] | None:
    """The same kinds at other places and sizes; None when there is no room."""
    boxes: list[Box] = []
    for _ in things:
        box = place(rng, size, boxes, scale)
        if box is None:
            return None
        boxes.append(box)
    return [replace(thing, box=box) for thing, box in zip(things, boxes, strict=True)]


def drift(rng: random.Random, things: list[Thing], size: tuple[int, int]) -> list[Thing] | None:
    """Every thing a small step further, still apart and inside; None when that fails."""
    for _ in range(40):
        moved: list[Thing] = []
        for thing in things:
            x0, y0, x1, y1 = thing.box
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
    """One kind that shares `attribute` with `kind` (and differs in the other of shape and colour), and two or three
    that do not share it, at least one of which shares the other attribute.
    """
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
