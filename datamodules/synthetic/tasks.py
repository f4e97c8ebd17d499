"""The ten MIG-Bench tasks in the nano world, in MIG-Bench's own task names and question wording.

A `Puzzle` is symbolic: scenes, question, answer, and a thinking text that states true facts. Each has exactly one right
answer, and distractors make every image needed (tests/datamodules/synthetic/test_tasks.py solves them by brute force).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from datamodules.boxes import Box
from datamodules.synthetic.rationales import ORDINALS, conclusion, pictures
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.world import (
    COLOURS,
    FILLS,
    KINDS,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    Thing,
    crop_scene,
    draw_scene,
    place,
    random_background,
    random_scene,
)

# Side of a thing as a share of the shorter picture side. `hard` things are 6 to 9 pixels after resizing: hardly solvable.
SCALES = {"easy": (0.38, 0.5), "normal": (0.24, 0.4), "hard": (0.08, 0.11)}
GROUP_GROUNDING = (
    "Please find the bounding box coordinates for the area described by: {}.",
    "Identify the bounding box of the region described by the following expression: {}.",
    "Please locate the bounding box of the region described in this sentence: {}.",
    "Please determine the bounding box coordinates for the area described here: {}.",
    "Please specify the bounding box coordinates for the region indicated by this sentence: {}.",
    "Please provide the bounding box coordinate of the region this sentence describes: {}.",
    "Provide the bounding box of the region this expression refers to: {}.",
    "Give the bounding box of the region that this sentence refers to: {}.",
    "Provide the bounding box coordinates for the region referred to by this sentence: {}.",
    "Give the bounding box coordinates of the area mentioned in this sentence: {}.",
    "Please identify the bounding box coordinates for the area described by this sentence: {}.",
)


@dataclass(frozen=True)
class Puzzle:
    """A question over several pictures. Picture k is `scenes[k]`, or its `crops[k]` part where that is a box.

    `target` is the 0-based image of the answer `box` (0-1 of that image); `query` the thing asked about in image 0 where
    there is one; `info` what MIG-Bench keeps in additional_info."""

    task: str
    scenes: tuple[Scene, ...]
    crops: tuple[Box | None, ...]
    question: str
    target: int
    box: Box
    label: str
    thinking: str
    info: str = ""
    query: Thing | None = None

    def picture(self, k: int) -> Image.Image:
        crop = self.crops[k]
        return draw_scene(self.scenes[k]) if crop is None else crop_scene(self.scenes[k], crop)

    def content_hashes(self) -> frozenset[str]:
        return frozenset(scene.content_hash() for scene in self.scenes)


def _puzzle(task: str, scenes: list[Scene], question: str, target: int, thing: Thing, thinking: str, **more) -> Puzzle:
    return Puzzle(
        task=task,
        scenes=tuple(scenes),
        crops=more.pop("crops", (None,) * len(scenes)),
        question=question,
        target=target,
        box=more.pop("box", thing.box),
        label=thing.kind.name,
        thinking=thinking,
        **more,
    )


def _thing(scene: Scene, kind: Kind) -> Thing:
    return next(thing for thing in scene.things if thing.kind == kind)


def _box_text(box: Box) -> str:
    x0, y0, x1, y1 = (round(v * 1000) for v in box)
    return f"(<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>)"


def _shuffled(rng: random.Random, kinds: list[Kind]) -> list[Kind]:
    return rng.sample(kinds, len(kinds))


def common_object(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """One kind is in every image. In the target image each other thing is missing from just one other image, so that
    leaving out any image leaves two candidates."""
    count = rng.choice((3, 3, 3, 4))
    target = rng.randrange(count)
    shared, *decoys = crowd(rng, count)
    missing_from = dict(zip((k for k in range(count) if k != target), decoys, strict=True))
    scenes = []
    for k in range(count):
        kinds = [shared] + [decoy for other, decoy in missing_from.items() if other != k]
        scenes.append(random_scene(rng, _shuffled(rng, kinds), scale=scale))
    question = f"These images share one object in common. Recognize and locate this object in the {target + 1}th image. "
    reason = rng.choice(("The only object in every image", "The object that all images share"))
    thinking = f"{pictures(rng, scenes)} {conclusion(rng, reason, shared.name, target)}"
    return _puzzle("common_object", scenes, question, target, _thing(scenes[target], shared), thinking)


def _changed(rng: random.Random, scale: tuple[float, float]) -> tuple[list[Thing], list[Thing], Thing]:
    """Two lists of things that differ in one: replaced by another kind, or new in the second list."""
    kinds = crowd(rng, rng.choice((3, 3, 4)))
    scene = random_scene(rng, kinds, scale=scale)
    *kept, last = scene.things
    if rng.random() < 0.5:
        return list(kept), [*kept, last], last
    other = next(kind for kind in crowd_around(rng, last.kind) if kind not in kinds)
    return [*kept, last], [*kept, replace(last, kind=other)], replace(last, kind=other)


def crowd_around(rng: random.Random, kind: Kind) -> list[Kind]:
    """All kinds that share two of three attributes with `kind`, in random order."""
    near = [
        k
        for k in KINDS
        if k != kind and (k.shape == kind.shape) + (k.colour == kind.colour) + (k.fill == kind.fill) == 2
    ]
    return rng.sample(near, len(near))


def diff(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """The same picture twice but for one thing of the second."""
    size, background = rng.choice(SIZES), random_background(rng)
    before, after, changed = _changed(rng, scale)
    scenes = [Scene(size, background, tuple(things)) for things in (before, after)]
    question = "Compare these two images carefully and give me the coordinates of their difference. "
    reason = rng.choice(("The object that only image 2 has", "What is different"))
    thinking = f"{pictures(rng, scenes)} {conclusion(rng, reason, changed.kind.name, 1)}"
    return _puzzle("diff", scenes, question, 1, changed, thinking)


def region(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """A source and crops of it, each around another thing; the Nth crop is to be found in the source."""
    source = random_scene(rng, crowd(rng, rng.choice((3, 4))), scale=scale)
    things = rng.sample(list(source.things), rng.choice((1, 2, 3)))
    crops = []
    for thing in things:
        margin_x, margin_y = ((b - a) * rng.uniform(0.04, 0.14) for a, b in (thing.box[::2], thing.box[1::2]))
        x0, y0, x1, y1 = thing.box
        width, height = source.size
        crops.append(
            (
                max(0, round((x0 - margin_x) * width)) / width,
                max(0, round((y0 - margin_y) * height)) / height,
                min(width, round((x1 + margin_x) * width)) / width,
                min(height, round((y1 + margin_y) * height)) / height,
            )
        )
    index = rng.randrange(len(things))
    question = (
        "You are given a source image followed by its several regions. "
        f"Please locate the {index + 1}th region picture in the source image. "
    )
    thinking = (
        f"{pictures(rng, [source])} "
        f"{conclusion(rng, f'What region {index + 1} shows', things[index].kind.name, 0)}"
    )
    return _puzzle(
        "region",
        [source] * (len(things) + 1),
        question,
        0,
        things[index],
        thinking,
        crops=(None, *crops),
        box=crops[index],
        query=things[index],
    )


def refer_grounding(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """One thing alone in image 1; the same kind among look-alikes in image 2."""
    kind = rng.choice(KINDS)
    alone = random_scene(rng, [kind], scale=(0.4, 0.6))
    others = crowd_around(rng, kind)[: rng.choice((2, 3))]
    raw = random_scene(rng, _shuffled(rng, [kind, *others]), scale=scale)
    question = "Find and locate where does the object in image-1 locate in the image-2."
    reason = rng.choice(("The object of image 1", "The same object in both images"))
    thinking = f"{pictures(rng, [alone, raw])} {conclusion(rng, reason, kind.name, 1)}"
    return _puzzle("refer_grounding", [alone, raw], question, 1, _thing(raw, kind), thinking)


def _moved(
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


def view_diff(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Two views of one set of things (other places, other light); one thing of the second is not in the first."""
    while True:
        before, after, changed = _changed(rng, scale)
        size = rng.choice(SIZES)
        moved = _moved(rng, after, size, scale)
        if moved is not None:
            break
    scenes = [
        Scene(rng.choice(SIZES), random_background(rng), tuple(before)),
        Scene(size, random_background(rng), tuple(moved)),
    ]
    question = (
        "Compare these two images carefully and give me the coordinates of their real difference in the second image. "
        " Find it and locate it in the second image. "
    )
    thinking = f"{pictures(rng, scenes)} {conclusion(rng, 'The real difference', changed.kind.name, 1)}"
    return _puzzle("view_diff", scenes, question, 1, _thing(scenes[1], changed.kind), thinking)


def _views(rng: random.Random, scale: tuple[float, float], count: int) -> tuple[list[Scene], Thing]:
    """`count` scenes of the same kinds at other places, and the thing of the first that is framed in red."""
    kinds = crowd(rng, rng.choice((2, 3)))
    scenes = [random_scene(rng, _shuffled(rng, kinds), scale=scale) for _ in range(count)]
    query = rng.choice(scenes[0].things)
    scenes[0] = scenes[0].with_frame(query.box)
    return scenes, query


def multi_view(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    scenes, query = _views(rng, scale, rng.choice((2, 2, 3, 3, 4)))
    target = rng.randrange(1, len(scenes))
    question = (
        "These images share one object in common(the object marked with red bounding box in the first image"
        f"{_box_text(query.box)}. Recognize and locate this object in the {target + 1}th image. "
    )
    thinking = f"{pictures(rng, scenes)} {conclusion(rng, 'The marked object', query.kind.name, target)}"
    return _puzzle(
        "multi_view", scenes, question, target, _thing(scenes[target], query.kind), thinking, query=query
    )


def object_tracking(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Six frames of one picture in which every thing drifts; frames keep size and light."""
    size, background = rng.choice(SIZES), random_background(rng)
    while True:
        start = random_scene(rng, crowd(rng, rng.choice((2, 3))), size, scale)
        frames = [list(start.things)]
        while len(frames) < 6 and frames[-1] is not None:
            frames.append(_drift(rng, frames[-1], size))
        if frames[-1] is not None:
            break
    scenes = [Scene(size, background, tuple(things)) for things in frames]
    query = rng.choice(scenes[0].things)
    scenes[0] = scenes[0].with_frame(query.box)
    target = rng.randrange(1, 6)
    question = (
        "These are a sequence of images containing moving objects. For the object in the first image marked with red "
        f"bounding box{_box_text(query.box)}, please locate it in the {target + 1}th image. "
    )
    thinking = conclusion(rng, "The marked object", query.kind.name, target)
    return _puzzle(
        "object_tracking", scenes, question, target, _thing(scenes[target], query.kind), thinking, query=query
    )


def _drift(rng: random.Random, things: list[Thing], size: tuple[int, int]) -> list[Thing] | None:
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


def group_grounding(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """A phrase that fits one thing of one image; the other images hold look-alikes."""
    count = rng.choice((3, 3, 4))
    target = rng.randrange(count)
    kind = rng.choice(KINDS)
    near = crowd_around(rng, kind)
    scenes = []
    for k in range(count):
        kinds = [near.pop(), *(other for other in crowd(rng, 2) if other != kind)]
        kinds = list(dict.fromkeys(kinds))[:2] + ([kind] if k == target else [])
        scenes.append(random_scene(rng, _shuffled(rng, kinds), scale=scale))
    phrase = f"<|object_ref_start|>a {kind.name}<|object_ref_end|>"
    thing = _thing(scenes[target], kind)
    box_text = "<|box_start|>({},{}),({},{})<|box_end|>".format(*(round(v * 1000) for v in thing.box))
    info = f"It is in the {ORDINALS[target]} image. {box_text}. "
    thinking = f"{pictures(rng, scenes)} {conclusion(rng, 'What the sentence describes', kind.name, target)}"
    question = rng.choice(GROUP_GROUNDING).format(phrase)
    return _puzzle("group_grounding", scenes, question, target, thing, thinking, info=info)


def reasoning(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Free questions about attributes: which thing of image 2 shares one with the thing of image 1."""
    kind = rng.choice(KINDS)
    alone = random_scene(rng, [kind], scale=(0.36, 0.55))
    attribute, question = rng.choice(REASONING)
    right, wrong = _sharing(rng, kind, attribute)
    raw = random_scene(rng, _shuffled(rng, [right, *wrong]), scale=scale)
    question = f"{question} Find it and locate it in the second image. "
    thinking = f"{pictures(rng, [alone, raw])} {conclusion(rng, f'What has the same {attribute}', right.name, 1)}"
    return _puzzle(
        "reasoning", [alone, raw], question, 1, _thing(raw, right), thinking, info=question[: question.index("?") + 1]
    )


REASONING = (
    ("shape", "Which object in Image-2 has the same shape as the object in Image-1?"),
    ("shape", "See the object in Image-1? Which object in Image-2 is formed like it?"),
    ("colour", "Which object in Image-2 has the same colour as the object in Image-1?"),
    ("colour", "See the object in Image-1? Which object in Image-2 could be painted with the same paint?"),
)


def _sharing(rng: random.Random, kind: Kind, attribute: str) -> tuple[Kind, list[Kind]]:
    """One kind that shares `attribute` with `kind` (and differs in the other of shape and colour), and two or three
    that do not share it, at least one of which shares the other attribute."""
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


def correspondence(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """The counterpart of a framed thing is the one of its shape in image 2, whatever its colour."""
    query_kind = rng.choice(KINDS)
    right, wrong = _sharing(rng, query_kind, "shape")
    first = random_scene(rng, _shuffled(rng, [query_kind, *wrong[:1]]), scale=scale)
    query = _thing(first, query_kind)
    second = random_scene(rng, _shuffled(rng, [right, *wrong]), scale=scale)
    scenes = [first.with_frame(query.box), second]
    question = (
        "You are now presented with two objects. For the area marked by the red bounding box in the first image, "
        "identify and locate the corresponding area in the second image that serves a similar function or shares a "
        "similar meaning. "
    )
    thinking = f"{pictures(rng, scenes)} {conclusion(rng, 'The counterpart of the marked object', right.name, 1)}"
    return _puzzle("correspondence", scenes, question, 1, _thing(second, right), thinking, query=query)


MAKERS: dict[str, Callable[[random.Random, tuple[float, float]], Puzzle]] = {
    "diff": diff,
    "view_diff": view_diff,
    "common_object": common_object,
    "object_tracking": object_tracking,
    "multi_view": multi_view,
    "region": region,
    "refer_grounding": refer_grounding,
    "group_grounding": group_grounding,
    "reasoning": reasoning,
    "correspondence": correspondence,
}


def make_puzzle(rng: random.Random, task: str, difficulty: str = "normal") -> Puzzle:
    """A new puzzle of a task; `difficulty` is one of `SCALES`."""
    return MAKERS[task](rng, SCALES[difficulty])
