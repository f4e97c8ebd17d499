"""Scenes of the synthetic dataset: things with a shape, a colour and a fill on a noisy background, and their drawing.

All boxes are unit xyxy (floats from 0 to 1 of the scene), as everywhere in this project. A scene is data. Its drawing
is a pure function of the scene, so equal scenes have equal pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from datamodules.samples.boxes import Box

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "green": (30, 165, 60),
    "blue": (35, 70, 220),
    "yellow": (240, 215, 30),
    "purple": (140, 45, 170),
    "white": (250, 250, 250),
}
MARGIN = (40, 40, 40)
TRIES = 60  # number of random places that are tried for a thing
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")
FILLS = ("solid", "hollow")
# (width, height) of the drawn picture in pixels. The nano processor (at most 10,000 pixels, multiples of 28) resizes
# them to 112x84, 84x112, 84x84 or 112x56: most change their size, some by different factors along the two axes.
SIZES = ((112, 84), (160, 120), (84, 112), (120, 160), (84, 84), (128, 128), (150, 100), (128, 96))


@dataclass(frozen=True)
class Kind:
    """The kind of a thing. Two things of one kind differ only in size and place."""

    shape: str
    colour: str
    fill: str = "solid"

    @property
    def name(self) -> str:
        """For example 'red circle' or 'hollow blue star'; the word 'solid' is left out."""
        return f"{self.colour} {self.shape}" if self.fill == "solid" else f"{self.fill} {self.colour} {self.shape}"


KINDS = tuple(Kind(shape, colour, fill) for shape in SHAPES for colour in COLOURS for fill in FILLS)


@dataclass(frozen=True)
class Thing:
    """A kind at a place."""

    kind: Kind
    box: Box  # the tight unit xyxy box around the drawn pixels


@dataclass(frozen=True)
class Scene:
    """One picture as data."""

    size: tuple[int, int]  # (width, height) in pixels
    background: tuple[int, int, int, int]  # grey level at the left and right edge, noise amplitude, noise seed
    things: tuple[Thing, ...]  # in drawing order
    frame: Box | None = None  # a red frame around this unit xyxy box, as MIG-Bench marks the object of a question

    def content_hash(self) -> str:
        """A hash of the scene: equal scenes have equal pixels. It keeps training and evaluation apart."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(thing.kind for thing in self.things)

    def with_frame(self, box: Box) -> Scene:
        """The same scene with a red frame around `box` (unit xyxy)."""
        return replace(self, frame=box)


def random_background(rng: random.Random) -> tuple[int, int, int, int]:
    """A random background: two grey levels, noise amplitude, noise seed."""
    return (rng.randint(95, 185), rng.randint(95, 185), rng.randint(0, 14), rng.randrange(1 << 30))


def place(rng: random.Random, size: tuple[int, int], taken: list[Box], scale: tuple[float, float]) -> Box | None:
    """A random free place for a thing, a unit xyxy box on whole pixels; None if `TRIES` random places are taken.

    Args:
        rng: source of randomness.
        size: (width, height) of the picture in pixels.
        taken: the boxes of the things that are there already.
        scale: smallest and largest side of the thing, as a share of the shorter side of the picture.
    """
    width, height = size
    for _ in range(TRIES):
        # Nearly square, and at least 5 pixels a side, so that every shape is recognizable.
        side = rng.uniform(*scale) * min(width, height)
        w = max(5, round(side * rng.uniform(0.85, 1.18)))
        h = max(5, round(side * rng.uniform(0.85, 1.18)))
        if w >= width - 2 or h >= height - 2:
            continue
        # Two pixels of space to every other thing.
        x, y = rng.randint(1, width - w - 1), rng.randint(1, height - h - 1)
        box = (x / width, y / height, (x + w) / width, (y + h) / height)
        gap_x, gap_y = 2 / width, 2 / height
        if all(
            box[0] >= b[2] + gap_x or b[0] >= box[2] + gap_x or box[1] >= b[3] + gap_y or b[1] >= box[3] + gap_y
            for b in taken
        ):
            return box
    return None


def random_scene(
    rng: random.Random,
    kinds: list[Kind],
    size: tuple[int, int] | None = None,
    scale: tuple[float, float] = (0.24, 0.42),
) -> Scene:
    """A scene with exactly these kinds, each at a random free place.

    Args:
        rng: source of randomness.
        kinds: the kinds in drawing order.
        size: (width, height) of the picture in pixels; None takes a random one of SIZES.
        scale: smallest and largest side of a thing, as a share of the shorter side of the picture.

    Raises:
        ValueError: there is no room for the things, however small they are.
    """
    size = size or rng.choice(SIZES)
    for attempt in range(50):
        shrink = 0.93**attempt  # in a crowded picture, things become smaller with each attempt
        boxes: list[Box] = []
        for _ in kinds:
            box = place(rng, size, boxes, (scale[0] * shrink, scale[1] * shrink))
            if box is None:
                break
            boxes.append(box)
        if len(boxes) == len(kinds):
            things = tuple(Thing(kind, box) for kind, box in zip(kinds, boxes, strict=True))
            return Scene(size, random_background(rng), things)
    raise ValueError(f"no room for {len(kinds)} things in a picture of {size}")


def _polygon(shape: str, x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    """The corners (x, y) of a shape that fills the box (x0, y0, x1, y1) in pixels."""
    cx, cy, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    if shape == "triangle":
        return [(cx, y0), (x1, y1), (x0, y1)]
    if shape == "diamond":
        return [(cx, y0), (x1, cy), (cx, y1), (x0, cy)]
    if shape == "cross":
        a, b, c, d = x0 + w / 3, x1 - w / 3, y0 + h / 3, y1 - h / 3
        return [(a, y0), (b, y0), (b, c), (x1, c), (x1, d), (b, d), (b, y1), (a, y1), (a, d), (x0, d), (x0, c), (a, c)]
    if shape == "star":
        points = []  # five tips, and between them five inner corners at 45 % of the radius
        for k in range(10):
            r = 1.0 if k % 2 == 0 else 0.45
            points.append((r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)))
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        # Stretched to the edges of the box, so that the stored box is tight.
        return [
            (x0 + (x - min(xs)) / (max(xs) - min(xs)) * w, y0 + (y - min(ys)) / (max(ys) - min(ys)) * h)
            for x, y in points
        ]
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, size: tuple[int, int]) -> None:
    """Draw a thing into a picture of `size` (width, height)."""
    width, height = size
    x0, y0 = round(thing.box[0] * width), round(thing.box[1] * height)
    x1, y1 = round(thing.box[2] * width) - 1, round(thing.box[3] * height) - 1  # Pillow draws the last pixel too
    colour = COLOURS[thing.kind.colour]
    line = max(2, round(min(x1 - x0, y1 - y0) * 0.16))
    hollow = thing.kind.fill == "hollow"
    if thing.kind.shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=None if hollow else colour, outline=colour, width=line)
        return
    points = _polygon(thing.kind.shape, x0, y0, x1, y1)
    if hollow:
        draw.polygon(points, fill=None, outline=colour, width=line)
    else:
        draw.polygon(points, fill=colour)


def draw_scene(scene: Scene) -> Image.Image:
    """Draw the scene: an RGB picture of `scene.size`."""
    # 1. Background: a horizontal ramp from one grey level to another, with grey noise.
    width, height = scene.size
    start, end, amplitude, seed = scene.background
    ramp = np.linspace(start, end, width, dtype=np.float32)[None, :, None]
    pixels = np.broadcast_to(ramp, (height, width, 3))
    if amplitude:
        noise = np.random.default_rng(seed).integers(-amplitude, amplitude + 1, (height, width, 1))
        pixels = pixels + noise
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(image)
    # 2. A thin dark margin, like that of a printed photo. Qwen's vision tower has only relative positions, so it needs
    # a fixed mark in the picture from which it can measure.
    draw.rectangle((0, 0, width - 1, height - 1), outline=MARGIN, width=max(2, round(min(width, height) * 0.03)))
    # 3. The things, and the red frame on top.
    for thing in scene.things:
        _draw_thing(draw, thing, scene.size)
    if scene.frame is not None:
        x0, y0, x1, y1 = scene.frame
        box = (round(x0 * width) - 2, round(y0 * height) - 2, round(x1 * width) + 1, round(y1 * height) + 1)
        draw.rectangle(box, outline=(255, 0, 0), width=2)
    return image


def crop_scene(scene: Scene, box: Box) -> Image.Image:
    """The part of the drawn scene inside a unit xyxy box, rounded to whole pixels."""
    width, height = scene.size
    return draw_scene(scene).crop(
        (round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height))
    )


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file. Compression level 1 is fast, and the noise hardly compresses anyway."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
