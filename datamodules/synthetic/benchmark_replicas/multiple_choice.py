"""Nano replicas of BLINK and MMIU: questions with options over scenes of the synthetic dataset, in their own files."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from datamodules.benchmarks.blink import IMAGES, SUBSETS
from datamodules.benchmarks.mmiu import COLUMNS, SPATIAL
from datamodules.synthetic.benchmark_replicas.grounding import pixels, save_jpeg
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.world import KINDS, Scene, Thing, draw_scene, encode_png, place, random_scene

# (images, question, options, index of the correct option)
Puzzle = tuple[list[Image.Image], str, list[str], int]
WHICH = ("the second image", "the third image")


def write_blink(root: Path, count: int) -> None:
    """Write `count` questions for each subset, as Parquet in Hugging Face's format (images as {"bytes", "path"})."""
    import pyarrow  # late: only benchmarks in Parquet need it
    import pyarrow.parquet as parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    # A stated schema, because Arrow cannot infer the type of a column that holds only None.
    schema = pyarrow.schema(
        [
            *((name, pyarrow.string()) for name in ("idx", "question", "sub_task", "answer", "prompt", "explanation")),
            ("choices", pyarrow.list_(pyarrow.string())),
            *((name, image) for name in IMAGES),
        ]
    )
    for subset in SUBSETS:
        rows = []
        for index in range(count):
            pictures, question, options, right = _BLINK[subset](random.Random(f"BLINK:{subset}:{index}"))
            listed = "".join(f"({chr(65 + k)}) {option}\n" for k, option in enumerate(options))
            stored = [{"bytes": encode_png(picture), "path": None} for picture in pictures]
            rows.append(
                {
                    "idx": f"val_{subset}_{index + 1}",
                    "question": question,
                    "sub_task": subset,
                    "answer": f"({chr(65 + right)})",
                    "prompt": f"{question} Select from the following choices.\n{listed}",
                    "explanation": "",
                    "choices": options,
                    **dict(zip(IMAGES, [*stored, *[None] * (len(IMAGES) - len(stored))], strict=True)),
                }
            )
        path = root / subset / "val-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def write_mmiu(root: Path, count: int) -> None:
    """Write `count` questions for each task key.

    Like the real file, it also has a question without `output`, and a question of a task that the loader leaves out.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    rows = []
    for column, keys in COLUMNS.items():
        category = "2D-spatial" if column in SPATIAL else "Semantic"
        make = _same_place if column in SPATIAL else _which_image
        for key in keys:
            for index in range(count):
                pictures, question, options, right = make(random.Random(f"MMIU:{key}:{index}"))
                names = [f"{category}/{key}/{key}_{index}_{k}.jpg" for k in range(len(pictures))]
                for name, picture in zip(names, pictures, strict=True):
                    save_jpeg(picture, root / name)
                listed = "\n".join(f"{chr(65 + k)}: {option}" for k, option in enumerate(options))
                rows.append(
                    {
                        "task": key,
                        "visual_input_component": "drawn image",
                        "source": "nano",
                        "options": listed,
                        "question": question,
                        "context": f"Select from the following choices.\n{listed}",
                        "input_image_path": [f"./{name}" for name in names],
                        "output": chr(65 + right),
                    }
                )
    rows.append(rows[0] | {"output": None})
    rows.append(rows[0] | {"task": "next_img_prediction"})  # a task of another group
    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "all.parquet")


def _options(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """The options in random order, and the index of the correct one."""
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def _counting(rng: random.Random) -> Puzzle:
    """How many objects does the picture show?"""
    count = rng.randint(1, 6)
    scene = random_scene(rng, crowd(rng, count))
    others = [str(n) for n in rng.sample([n for n in range(1, 8) if n != count], 3)]
    return [draw_scene(scene)], "How many objects are in the image?", *_options(rng, str(count), others)


def _forensic(rng: random.Random) -> Puzzle:
    """Which of four pictures lacks the thing that the other three show?"""
    shared, other = rng.sample(KINDS, 2)
    right = rng.randrange(4)
    pictures = [draw_scene(random_scene(rng, [other if k == right else shared])) for k in range(4)]
    options = [f"the {name} image" for name in ("first", "second", "third", "fourth")]
    return pictures, f"Which image does not show a {shared.name}?", options, right


def _iq(rng: random.Random) -> Puzzle:
    """Which object begins farthest to the left?"""
    scene = random_scene(rng, crowd(rng, 4))
    first = min(scene.things, key=lambda thing: thing.box[0])
    others = [thing.kind.name for thing in scene.things if thing is not first]
    return [draw_scene(scene)], "Which object begins farthest to the left?", *_options(rng, first.kind.name, others)


def _jigsaw(rng: random.Random) -> Puzzle:
    """Which image is the missing part of the first image, whose lower right corner is black?"""
    scenes = [random_scene(rng, crowd(rng, 4), (112, 84)) for _ in range(2)]
    corner = (56, 42, 112, 84)  # pixels, the lower right quarter
    whole = draw_scene(scenes[0])
    pieces = [draw_scene(scene).crop(corner) for scene in scenes]
    right = rng.randrange(2)
    ImageDraw.Draw(whole).rectangle(corner, fill="black")
    question = "Which image is the missing part of the first image?"
    return [whole, *(pieces if right == 0 else pieces[::-1])], question, list(WHICH), right


def _multi_view(rng: random.Random) -> Puzzle:
    """Did the object move to the left or to the right?"""
    kind, size = rng.choice(KINDS), (120, 90)
    places = sorted((place(rng, size, [], (0.24, 0.4)) for _ in range(2)), key=lambda box: box[0])
    right = rng.randrange(2)
    order = places[::-1] if right == 0 else places  # option 0 is "left": from the right place to the left one
    scenes = [random_scene(rng, [kind], size) for _ in range(2)]
    pictures = [draw_scene(replace(s, things=(Thing(kind, b),))) for s, b in zip(scenes, order, strict=True)]
    return pictures, "Did the object move to the left or to the right?", ["left", "right"], right


def _similarity(rng: random.Random) -> Puzzle:
    """Which image has the same kinds of things as the first image?"""
    kinds, others = crowd(rng, 3), crowd(rng, 3)
    same, other = random_scene(rng, kinds), random_scene(rng, others)
    right = rng.randrange(2)
    pair = [same, other] if right == 0 else [other, same]
    pictures = [draw_scene(scene) for scene in (random_scene(rng, kinds), *pair)]
    return pictures, "Which image is most similar to the first image?", list(WHICH), right


def _correspondence(rng: random.Random) -> Puzzle:
    """Which point of the second picture lies on the thing that is framed in the first picture?"""
    return _framed(rng, 4, "Which point of the second image corresponds to the framed object?", _point)


def _framed(rng: random.Random, count: int, question: str, place: Callable[[Thing, Scene], str]) -> Puzzle:
    """A question about the place, in the second picture, of one of `count` things that is framed in the first one."""
    kinds = crowd(rng, count)
    first, second = random_scene(rng, kinds), random_scene(rng, kinds)
    index = rng.randrange(count)
    places = [place(thing, second) for thing in second.things]
    options, right = _options(rng, places[index], places[:index] + places[index + 1 :])
    return [draw_scene(first.with_frame(first.things[index].box)), draw_scene(second)], question, options, right


def _which_image(rng: random.Random) -> Puzzle:
    """Which image shows an object of this kind?"""
    kinds = rng.sample(KINDS, rng.randint(2, 4))
    right = rng.randrange(len(kinds))
    pictures = [draw_scene(random_scene(rng, [kind])) for kind in kinds]
    return pictures, f"Which image shows a {kinds[right].name}?", [f"image {k + 1}" for k in range(len(kinds))], right


def _same_place(rng: random.Random) -> Puzzle:
    """Which unit xyxy box in the second picture has the thing that is framed in the first picture?"""
    question = "What is the position of the framed object of image 1 in image 2?"
    return _framed(rng, 3, question, lambda thing, _: str([round(value, 2) for value in thing.box]))


def _point(thing: Thing, scene: Scene) -> str:
    """The centre of a thing in pixels, as text."""
    x1, y1, x2, y2 = pixels(thing.box, scene.size)
    return f"({round((x1 + x2) / 2)}, {round((y1 + y2) / 2)})"


_BLINK: dict[str, Callable[[random.Random], Puzzle]] = {
    "Counting": _counting,
    "Forensic_Detection": _forensic,
    "IQ_Test": _iq,
    "Jigsaw": _jigsaw,
    "Multi-view_Reasoning": _multi_view,
    "Visual_Similarity": _similarity,
    "Visual_Correspondence": _correspondence,
}
