"""Nano replica of MC-Bench: descriptions of things in two pictures, in its own file and field names."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.benchmarks.mc_bench import FILE, IMAGES
from datamodules.synthetic.benchmark_replicas.grounding import pixels, save_jpeg
from datamodules.synthetic.puzzles import shuffled
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.world import Kind, Scene, Thing, draw_scene, random_scene

SIZES = ((112, 84), (84, 112), (84, 84))  # (width, height) in pixels
SCALE = (0.24, 0.4)  # smallest and largest side of a thing, as a share of the shorter side of the picture
MOST_GROUPS = 3
# The description, the two scenes, and the group from 1 of each kind that answers.
Puzzle = tuple[str, tuple[Scene, Scene], dict[Kind, int]]


def write_mc_bench(root: Path, count: int) -> None:
    """Write `count` descriptions of each style.

    Like the real file, every seventh description has no answer, and one of these has a wrong `positive_sample`. Some
    descriptions have several groups.
    """
    tables: dict[str, list[dict[str, Any]]] = {"descriptions": [], "images": [], "annotations": [], "categories": []}
    for group in range(1, MOST_GROUPS + 1):
        tables["categories"].append({"id": group, "name": f"group {group}"})
    for style, make in _STYLES.items():
        for index in range(count):
            text, scenes, groups = make(random.Random(f"MC-Bench:{style}:{index}"), index % 7 == 3)
            _add(tables, root, style, text, scenes, groups)
    unanswered = [found for found in tables["descriptions"] if not found["positive_sample"]]
    if unanswered:
        unanswered[0]["positive_sample"] = True
    (root / FILE).write_text(json.dumps({"info": {"description": "nano replica"}} | tables))


def _add(
    tables: dict[str, list[dict[str, Any]]],
    root: Path,
    style: str,
    text: str,
    scenes: tuple[Scene, Scene],
    groups: dict[Kind, int],
) -> None:
    """Write the pictures of a puzzle and add its records."""
    number = len(tables["descriptions"])
    places = [2 * number, 2 * number + 1]
    for inter, (place, scene) in enumerate(zip(places, scenes, strict=True)):
        name = f"nano/{place:05d}.jpg"
        save_jpeg(draw_scene(scene), root / IMAGES[0] / name)
        width, height = scene.size
        image = {"id": place, "text_id": number, "inter_img_id": inter, "file_name": name}
        tables["images"].append(image | {"height": height, "width": width})
        for thing in scene.things:
            if thing.kind in groups:
                about = {"id": len(tables["annotations"]), "image_id": place, "text_id": number}
                tables["annotations"].append(about | _annotation(thing, scene, groups[thing.kind]))
    positive = any(thing.kind in groups for scene in scenes for thing in scene.things)
    description = {"id": number, "images_id": places, "text": text, "positive_sample": positive, "text_style": style}
    tables["descriptions"].append(description)


def _annotation(thing: Thing, scene: Scene, group: int) -> dict[str, Any]:
    x1, y1, x2, y2 = (int(value) for value in pixels(thing.box, scene.size))
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"category_id": group, "area": box[2] * box[3], "bbox": box, "iscrowd": 0}


def _scene(rng: random.Random, kinds: list[Kind]) -> Scene:
    return random_scene(rng, shuffled(rng, kinds), rng.choice(SIZES), SCALE)


def _referring(rng: random.Random, unanswered: bool) -> Puzzle:
    """All things of one kind: in one picture, in both, or in none."""
    kind, *others = crowd(rng, 5)
    first, second = (0, 0) if unanswered else rng.choice(((0, 1), (1, 0), (1, 1), (2, 0), (1, 2)))
    scenes = _scene(rng, [kind] * first + others[:2]), _scene(rng, [kind] * second + others[2:])
    return f"Every {kind.name}", scenes, {kind: 1}


def _comparison(rng: random.Random, unanswered: bool) -> Puzzle:
    """The things whose kind the other picture does not hold."""
    alone, *both = crowd(rng, 3)
    extra = [] if unanswered else [alone] * rng.choice((1, 2))
    pictures = [both + extra, both]
    rng.shuffle(pictures)
    scenes = _scene(rng, pictures[0]), _scene(rng, pictures[1])
    return "The objects that are in only one of the two images", scenes, {alone: 1}


def _reasoning(rng: random.Random, unanswered: bool) -> Puzzle:
    """The things that both pictures show: each kind is a group."""
    num_groups = 0 if unanswered else rng.choice((1, 2, 2, MOST_GROUPS))
    kinds = crowd(rng, num_groups + 2)
    shared = kinds[:num_groups]
    scenes = _scene(rng, [*shared, kinds[-2]]), _scene(rng, [*shared, kinds[-1]])
    return "The same objects in both images", scenes, {kind: group for group, kind in enumerate(shared, 1)}


_STYLES: dict[str, Callable[[random.Random, bool], Puzzle]] = {
    "Referring": _referring,
    "Comparison": _comparison,
    "Reasoning": _reasoning,
}
