"""Nano replicas of Ref-L4, ReasonSeg (LISA-Grounding), ReVOS and ODinW, in their own files and field names."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.benchmarks.odinw import FILE, SETS
from datamodules.benchmarks.reading.masks import encode_counts
from datamodules.samples.boxes import Box
from datamodules.synthetic.single_image import crowd
from datamodules.synthetic.world import KINDS, Scene, Thing, draw_scene, random_scene

NUM_FRAMES = 8  # frames of a ReVOS video


def write_ref_l4(root: Path, count: int) -> None:
    """Write one Parquet file with `count` captions for each split, and images/."""
    import pyarrow  # late: only benchmarks in Parquet need it
    import pyarrow.parquet as parquet

    for split in ("val", "test"):
        rows = []
        for index in range(count):
            _, scene, thing = _draw(f"Ref-L4:{split}:{index}")
            name = f"{split}_{index:05d}.jpg"
            save_jpeg(draw_scene(scene), root / "images" / name)
            x1, y1, x2, y2 = pixels(thing.box, scene.size)
            rows.append(
                {
                    "id": f"{split}{index:06d}",
                    "caption": f"The {thing.kind.name}{_place(thing.box)} of the picture, on a grey background.",
                    "bbox": [x1, y1, x2 - x1, y2 - y1],  # x, y, width, height in pixels
                    "bbox_area": (x2 - x1) * (y2 - y1),
                    "bbox_id": index,
                    "ori_category_id": f"o365_{KINDS.index(thing.kind) + 1}",
                    "image_id": index,
                    "height": scene.size[1],
                    "width": scene.size[0],
                    "file_name": name,
                    "is_rewrite": 0,
                }
            )
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"ref-l4-{split}.parquet")


def write_reason_seg(root: Path, count: int) -> None:
    """Write `count` pictures with polygons for each split.

    Like the real files, every fourth picture also has a polygon that is ignored, and some JSON files are in cp1252.
    """
    for split in ("val", "test"):
        for index in range(count):
            _, scene, thing = _draw(f"ReasonSeg:{split}:{index}")
            shapes = [_shape("target", thing.box, scene.size)]
            if index % 4 == 0:
                shapes.append(_shape("ignore", (0.02, 0.02, 0.06, 0.06), scene.size))
            text = f"the {thing.kind.shape} whose colour is {thing.kind.colour} and whose inside is {thing.kind.fill}"
            record = {"text": [text, thing.kind.name], "is_sentence": True, "shapes": shapes}
            path = root / split / f"{index:05d}.jpg"
            save_jpeg(draw_scene(scene), path)
            record["comment"] = "drawn – by a program"  # the dash has other bytes in cp1252 than in UTF-8
            encoding = "cp1252" if index % 5 == 4 else "utf-8"
            path.with_suffix(".json").write_text(json.dumps(record, ensure_ascii=False), encoding=encoding)


def write_revos(root: Path, count: int) -> None:
    """Write `count` videos, each with a referring and a reasoning expression; some have one without a target too."""
    videos: dict[str, Any] = {}
    masks: dict[str, list[Any]] = {}
    for index in range(count):
        rng, scene, thing = _draw(f"ReVOS:{index}")
        steps = _drift(rng, scene, thing)
        video = f"video_{index:04d}"
        names = [f"{5 * step:05d}" for step in range(NUM_FRAMES)]
        for name, frame in zip(names, steps, strict=True):
            save_jpeg(draw_scene(frame), root / "JPEGImages" / video / f"{name}.jpg")
        target = scene.things.index(thing)
        # In some videos the target is not yet in the first frame: its mask there is None.
        masks[str(index)] = [
            None if step == 0 and index % 3 == 0 else box_rle(frame.things[target].box, frame.size)
            for step, frame in enumerate(steps)
        ]
        common = {"obj_id": [1], "anno_id": [index]}
        expressions = {
            "0": {"exp": f"the {thing.kind.name}", "type_id": 0, **common},
            "1": {"exp": f"what is {thing.kind.colour} and shaped like a {thing.kind.shape}", "type_id": 1, **common},
        }
        if index % 4 == 0:
            expressions["2"] = {"exp": "the animal that sleeps", "type_id": 2, "obj_id": [], "anno_id": []}
        videos[video] = {"vid_id": index, "frames": names, "expressions": expressions}
    (root / "meta_expressions_valid_.json").write_text(json.dumps({"videos": videos}))
    (root / "mask_dict.json").write_text(json.dumps(masks))


def write_odinw(root: Path, count: int) -> None:
    """Write `count` pictures for each of the data sets of ODinW.

    In some pictures a category occurs twice. The loader makes no question of such a category.
    """
    for column, folder in SETS.items():
        categories = [{"id": i + 1, "name": kind.name, "supercategory": "thing"} for i, kind in enumerate(KINDS)]
        images, annotations = [], []
        for index in range(count):
            rng = random.Random(f"ODinW:{column}:{index}")
            kinds = crowd(rng, rng.randint(1, 3))
            scene = random_scene(rng, [*kinds, kinds[0]] if len(kinds) == 3 else kinds)
            name = f"{index:05d}_jpg.rf.{index:04x}.jpg"
            save_jpeg(draw_scene(scene), root / folder / "valid" / name)
            width, height = scene.size
            images.append({"id": index, "file_name": name, "height": height, "width": width})
            for thing in scene.things:
                x1, y1, x2, y2 = pixels(thing.box, scene.size)
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": index,
                        "category_id": KINDS.index(thing.kind) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "segmentation": [],
                        "iscrowd": 0,
                    }
                )
        coco = {"images": images, "categories": categories, "annotations": annotations}
        (root / folder / "valid" / FILE).write_text(json.dumps(coco))


def _draw(name: str) -> tuple[random.Random, Scene, Thing]:
    """The random numbers of this name, a scene with two to four things, and the thing that is asked for."""
    rng = random.Random(name)
    scene = random_scene(rng, crowd(rng, rng.randint(2, 4)))
    return rng, scene, rng.choice(scene.things)


def _place(box: Box) -> str:
    """The quarter of the picture that holds the centre of the box, in words."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return f" in the {'upper' if y < 0.5 else 'lower'} {'left' if x < 0.5 else 'right'} part"


def _drift(rng: random.Random, scene: Scene, thing: Thing) -> list[Scene]:
    """NUM_FRAMES frames in which `thing` moves by whole pixels and stays inside the picture."""
    width, height = scene.size
    dx, dy = rng.choice((-1, 1)) / width, rng.choice((-1, 1)) / height
    frames = []
    for step in range(NUM_FRAMES):
        x1, y1, x2, y2 = thing.box
        x = min(max(dx * step, -x1), 1 - x2)
        y = min(max(dy * step, -y1), 1 - y2)
        moved = Thing(thing.kind, (x1 + x, y1 + y, x2 + x, y2 + y))
        frames.append(replace(scene, things=tuple(moved if other is thing else other for other in scene.things)))
    return frames


def _shape(label: str, box: Box, size: tuple[int, int]) -> dict[str, Any]:
    """The unit xyxy box as a polygon of the tool labelme, in pixels of a picture of `size` (width, height)."""
    x1, y1, x2, y2 = pixels(box, size)
    # The reader fills the polygon and its outline, so the corners are the last pixels inside the box.
    corners = [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]]
    return {"label": label, "points": corners, "shape_type": "polygon"}


def box_rle(box: Box, size: tuple[int, int]) -> dict[str, Any]:
    """The filled unit xyxy box as a compressed mask in COCO's format, for a picture of `size` (width, height)."""
    width, height = size
    x1, y1, x2, y2 = (round(value) for value in pixels(box, size))
    # Run lengths go down the columns, and alternate between outside and inside; the first run is outside.
    runs = [x1 * height + y1]
    for _ in range(x2 - x1 - 1):
        runs += [y2 - y1, height - (y2 - y1)]
    runs += [y2 - y1, (width - x2) * height + height - y2]
    if runs[-1] == 0:
        runs.pop()
    return {"size": [height, width], "counts": encode_counts(_merged(runs))}


def _merged(runs: Sequence[int]) -> list[int]:
    """The runs without inner runs of length 0, whose neighbours are joined. A box as high as the picture has them."""
    merged = [runs[0]]
    skip = False  # the run before had length 0, so this run continues the one before that
    for run in runs[1:]:
        if skip:
            merged[-1] += run
            skip = False
        elif run == 0:
            skip = True
        else:
            merged.append(run)
    return merged


def pixels(box: Box, size: tuple[int, int]) -> tuple[float, ...]:
    """The unit xyxy box in whole pixels of a picture of `size` (width, height)."""
    sizes = (*size, *size)
    return tuple(float(round(value * total)) for value, total in zip(box, sizes, strict=True))


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Write the image as a JPEG file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=90)
