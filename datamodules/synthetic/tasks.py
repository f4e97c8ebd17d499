"""The ten MIG-Bench tasks in the synthetic dataset, with MIG-Bench's own task names and question wording.

A `Puzzle` is symbolic: scenes, question, answer, and a reason that is true of this answer alone. Each puzzle has
exactly one correct answer. Distractors make every image necessary (tests/datamodules/synthetic/test_tasks.py solves the
puzzles by brute force).

Every function below makes one puzzle. `scale` is the smallest and largest side of a thing, as a share of the shorter
side of the picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from datamodules.synthetic.puzzles import (
    Puzzle,
    box_text,
    change_one,
    close_up,
    crowd_around,
    drift,
    move_all,
    sharing,
    shuffled,
    thing_of,
)
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.thinking_texts import ORDINALS
from datamodules.synthetic.world import KINDS, SIZES, Scene, Thing, random_background, random_scene

# `hard` things have mostly 6 to 10 pixels a side after resizing, so such puzzles can hardly be solved.
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
REASONING = (
    ("shape", "Which object in Image-2 has the same shape as the object in Image-1?"),
    ("shape", "See the object in Image-1? Which object in Image-2 is formed like it?"),
    ("colour", "Which object in Image-2 has the same colour as the object in Image-1?"),
    ("colour", "See the object in Image-1? Which object in Image-2 could be painted with the same paint?"),
)


def common_object(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """One kind is in every image.

    Each other thing of the target image is missing in exactly one other image. So whoever ignores one of the other
    images has two candidates left.
    """
    count = rng.choice((3, 3, 3, 4))
    target = rng.randrange(count)
    shared, *decoys = crowd(rng, count)
    missing_from = dict(zip((k for k in range(count) if k != target), decoys, strict=True))  # image -> decoy
    scenes = []
    for k in range(count):
        kinds = [shared] + [decoy for other, decoy in missing_from.items() if other != k]
        scenes.append(random_scene(rng, shuffled(rng, kinds), scale=scale))
    question = (
        f"These images share one object in common. Recognize and locate this object in the {target + 1}th image. "
    )
    reasons = ("The only object in every image", "The object that all images share")
    return Puzzle("common_object", tuple(scenes), question, target, thing_of(scenes[target], shared), reasons)


def diff(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Two pictures that are equal except for one thing in the second."""
    size, background = rng.choice(SIZES), random_background(rng)
    before, after, changed = change_one(rng, size, scale)
    # The same size and background: everything else is equal, pixel by pixel.
    scenes = [Scene(size, background, tuple(things)) for things in (before, after)]
    question = "Compare these two images carefully and give me the coordinates of their difference. "
    reasons = ("The object that only image 2 has", "What is different")
    return Puzzle("diff", tuple(scenes), question, 1, changed, reasons)


def region(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """A source image and crops of it, each around another thing. The question asks where the Nth crop lies."""
    source = random_scene(rng, crowd(rng, rng.choice((3, 4))), scale=scale)
    things = rng.sample(list(source.things), rng.choice((1, 2, 3)))
    crops = [close_up(rng, thing, source.size) for thing in things]
    index = rng.randrange(len(things))
    question = (
        "You are given a source image followed by its several regions. "
        f"Please locate the {index + 1}th region picture in the source image. "
    )
    reasons = (f"What region {index + 1} shows",)
    # The answer is the place of the crop, which is slightly larger than the thing in it.
    return Puzzle(
        "region",
        (source,) * (len(things) + 1),
        question,
        0,
        things[index],
        reasons,
        crops=(None, *crops),
        region=crops[index],
        query=things[index],
    )


def refer_grounding(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Image 1 has a single thing. Image 2 has the same kind among look-alikes."""
    kind = rng.choice(KINDS)
    alone = random_scene(rng, [kind], scale=(0.4, 0.6))
    others = crowd_around(rng, kind)[: rng.choice((2, 3))]
    raw = random_scene(rng, shuffled(rng, [kind, *others]), scale=scale)
    question = "Find and locate where does the object in image-1 locate in the image-2."
    reasons = ("The object of image 1", "The same object in both images")
    return Puzzle("refer_grounding", (alone, raw), question, 1, thing_of(raw, kind), reasons)


def view_diff(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Two views of a set of things, at other places and in other light. One thing of the second is not in the first."""
    while True:  # until the moved things have found room
        first_size, size = rng.choice(SIZES), rng.choice(SIZES)
        before, after, changed = change_one(rng, first_size, scale)
        moved = move_all(rng, after, size, scale)
        if moved is not None:
            break
    scenes = [
        Scene(first_size, random_background(rng), tuple(before)),
        Scene(size, random_background(rng), tuple(moved)),
    ]
    question = (
        "Compare these two images carefully and give me the coordinates of their real difference in the second image. "
        " Find it and locate it in the second image. "
    )
    reasons = ("The real difference",)
    return Puzzle("view_diff", tuple(scenes), question, 1, thing_of(scenes[1], changed.kind), reasons)


def _views(rng: random.Random, scale: tuple[float, float], count: int) -> tuple[list[Scene], Thing]:
    """`count` scenes with the same kinds at other places, and the thing that has a red frame in the first scene."""
    kinds = crowd(rng, rng.choice((2, 3)))
    scenes = [random_scene(rng, shuffled(rng, kinds), scale=scale) for _ in range(count)]
    query = rng.choice(scenes[0].things)
    scenes[0] = scenes[0].with_frame(query.box)
    return scenes, query


def multi_view(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Several views of the same things. The question asks for the framed thing in one of the later views."""
    scenes, query = _views(rng, scale, rng.choice((2, 2, 3, 3, 4)))
    target = rng.randrange(1, len(scenes))  # never the first image, where the frame shows the answer
    question = (
        "These images share one object in common(the object marked with red bounding box in the first image"
        f"{box_text(query.box)}. Recognize and locate this object in the {target + 1}th image. "
    )
    reasons = ("The marked object",)
    return Puzzle(
        "multi_view", tuple(scenes), question, target, thing_of(scenes[target], query.kind), reasons, query=query
    )


def object_tracking(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """Six frames in which every thing moves in small steps. Size and background stay the same."""
    size, background = rng.choice(SIZES), random_background(rng)
    while True:  # until all steps of all frames have found room
        start = random_scene(rng, crowd(rng, rng.choice((2, 3))), size, scale)
        frames = [list(start.things)]
        while len(frames) < 6 and frames[-1] is not None:
            frames.append(drift(rng, frames[-1], size))
        if frames[-1] is not None:
            break
    scenes = [Scene(size, background, tuple(things)) for things in frames]
    query = rng.choice(scenes[0].things)
    scenes[0] = scenes[0].with_frame(query.box)
    target = rng.randrange(1, 6)
    question = (
        "These are a sequence of images containing moving objects. For the object in the first image marked with red "
        f"bounding box{box_text(query.box)}, please locate it in the {target + 1}th image. "
    )
    reasons = ("The marked object",)
    return Puzzle(
        "object_tracking", tuple(scenes), question, target, thing_of(scenes[target], query.kind), reasons, query=query
    )


def group_grounding(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """A phrase that describes one thing in one image. The other images have look-alikes."""
    count = rng.choice((3, 3, 4))
    target = rng.randrange(count)
    kind = rng.choice(KINDS)
    near = crowd_around(rng, kind)
    scenes = []
    for k in range(count):
        # Two other kinds in every image, at least one of them a look-alike; the answer only in the target image.
        kinds = [near.pop(), *(other for other in crowd(rng, 2) if other != kind)]
        kinds = list(dict.fromkeys(kinds))[:2] + ([kind] if k == target else [])
        scenes.append(random_scene(rng, shuffled(rng, kinds), scale=scale))
    phrase = f"<|object_ref_start|>a {kind.name}<|object_ref_end|>"
    thing = thing_of(scenes[target], kind)
    info = f"It is in the {ORDINALS[target]} image. {box_text(thing.box)[1:-1]}. "
    reasons = ("What the sentence describes",)
    question = rng.choice(GROUP_GROUNDING).format(phrase)
    return Puzzle("group_grounding", tuple(scenes), question, target, thing, reasons, info=info)


def reasoning(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """A freely worded question: which thing in image 2 has the same shape or colour as the thing in image 1."""
    kind = rng.choice(KINDS)
    alone = random_scene(rng, [kind], scale=(0.36, 0.55))
    attribute, free_text = rng.choice(REASONING)
    right, wrong = sharing(rng, kind, attribute)  # a wrong one shares the other attribute
    raw = random_scene(rng, shuffled(rng, [right, *wrong]), scale=scale)
    question = f"{free_text} Find it and locate it in the second image. "
    reasons = (f"What has the same {attribute}",)
    return Puzzle("reasoning", (alone, raw), question, 1, thing_of(raw, right), reasons, info=free_text)


def correspondence(rng: random.Random, scale: tuple[float, float]) -> Puzzle:
    """The counterpart of the framed thing is the thing in image 2 with the same shape, in any colour."""
    query_kind = rng.choice(KINDS)
    right, wrong = sharing(rng, query_kind, "shape")
    # A second thing in the first image, so that the frame is necessary.
    first = random_scene(rng, shuffled(rng, [query_kind, *wrong[:1]]), scale=scale)
    query = thing_of(first, query_kind)
    second = random_scene(rng, shuffled(rng, [right, *wrong]), scale=scale)
    scenes = (first.with_frame(query.box), second)
    question = (
        "You are now presented with two objects. For the area marked by the red bounding box in the first image, "
        "identify and locate the corresponding area in the second image that serves a similar function or shares a "
        "similar meaning. "
    )
    reasons = ("The counterpart of the marked object",)
    return Puzzle("correspondence", scenes, question, 1, thing_of(second, right), reasons, query=query)


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
    """A new puzzle of a task; `difficulty` is a key of `SCALES`."""
    return MAKERS[task](rng, SCALES[difficulty])
