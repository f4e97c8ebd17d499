"""Tracks and groups of MGrounding: every box arrives in its image, and each planted fault is rejected by its rule."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.benchmarks.mig_bench import ORDINALS
from datamodules.importers.mgrounding import NAME
from datamodules.samples.sample import BoxAnswer
from datamodules.samples.scores import true_boxes
from datamodules.streaming.shard_reader import ShardReader
from experiments import import_shards

Boxes = list[tuple[int, tuple[int, ...]]]  # (image from 0, xyxy in 0-1000)


def notation(box: tuple[int, ...]) -> str:
    return "<|box_start|>({},{}),({},{})<|box_end|>".format(*box)


def random_boxes(rng: random.Random, images: list[int]) -> Boxes:
    boxes = []
    for image in images:
        x, y = rng.randrange(500), rng.randrange(500)
        boxes.append((image, (x, y, x + rng.randrange(2, 400), y + rng.randrange(2, 400))))
    return boxes


def track(rng: random.Random) -> tuple[str, str, Boxes]:
    """Question, answer, and the boxes that the answer means."""
    query = f"Track the object at {notation((10, 20, 300, 400))} of the first image in the following ones."
    kind = rng.randrange(4)
    boxes = random_boxes(rng, [1, 2, 3])
    if kind == 0:  # in order, without the marked frame
        return query, " ".join(notation(box) for _, box in boxes), boxes
    if kind == 1:  # with names
        return query, " ".join(f"Image-{image + 1}: {notation(box)}" for image, box in boxes), boxes
    if kind == 2:  # the object has left an image
        del boxes[1]
        return query, ", ".join(f"In the {ORDINALS[image]} image {notation(box)}" for image, box in boxes), boxes
    boxes = random_boxes(rng, [0, 1, 2, 3])  # in order, with the first frame
    return "Track the moving object.", "".join(notation(box) for _, box in boxes), boxes


def group(rng: random.Random) -> tuple[str, str, Boxes]:
    images = sorted(rng.choices(range(4), k=rng.randrange(2, 6)))
    boxes = random_boxes(rng, images)
    words = []
    for place, (image, box) in enumerate(boxes):
        named = place and boxes[place - 1][0] == image  # further boxes of an image follow the first one
        words.append(notation(box) if named else f"In image-{image + 1}: {notation(box)}")
    return "Find <|object_ref_start|>every kite<|object_ref_end|>.", ", ".join(words), boxes


FAULTS = {  # answer -> the rule that rejects it
    f"Image-2: {notation((5, 6, 70, 80))}, image-3: {notation((50, 60, 50, 80))}": "degenerate_box",
    f"Image-2: {notation((5, 6, 70, 80))}, image-3: {notation((50, 60, 5, 80))}": "degenerate_box",
    f"Image-2: {notation((5, 6, 70, 80))}, image-3: {notation((50, 60, 1001, 80))}": "out_of_range_box",
    f"Image-2: {notation((5, 6, 70, 80))}, image-9: {notation((50, 60, 70, 80))}": "image_index",
    f"{notation((5, 6, 70, 80))}{notation((50, 60, 70, 80))}": "image_unknown",
    f"In the first and second image: {notation((5, 6, 70, 80))}, {notation((50, 60, 70, 80))}": "image_unknown",
    f"Image-1: {notation((5, 6, 70, 80))}. {notation((50, 60, 70, 80))} is in image-2.": "image_unknown",
    f"As in image-1: {notation((5, 6, 70, 80))}, {notation((50, 60, 70, 80))}": "image_conflict",
    f"As in image-1, {notation((5, 6, 70, 80))} in image-2, {notation((50, 60, 70, 80))} in image-3": "image_unknown",
    f"The object of the first image is at {notation((5, 6, 70, 80))} in the third image.": "image_unknown",
    f"That of image-1: {notation((5, 6, 70, 80))} is in image-4": "image_unknown",
    "It has left all images.": "no_box",
}


def write(root: Path, rng: random.Random, count: int) -> dict[str, Boxes]:
    """A data set of `count` tracks and groups, with all faults among them. Returns the boxes by the record's id."""
    answers = [(make, *make(rng)) for make in (track, group) for _ in range(count)]
    faults = [(track, "Track the moving object.", text, None) for text in FAULTS]
    records: list[dict[str, Any]] = []
    expected = {}
    for number, (make, question, answer, boxes) in enumerate(rng.sample(answers + faults, len(answers) + len(faults))):
        folder = "Object_Tracking/GOT-10k" if make is track else "Group_Grounding/SA-1B"
        images = [f"./{NAME}/{folder}/{number}_{k}.png" for k in range(4)]
        for name in images:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (28, 28)).save(root / name)
        turns = [{"from": "human", "value": "<image>\n" * 4 + question}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "images": images, "conversations": turns, "type": "made"})
        if boxes is not None:
            expected[str(number)] = boxes
    (root / NAME / f"{NAME}.json").write_text(json.dumps(records))
    return expected


def test_every_box_of_tracks_and_groups_arrives_in_its_image_and_every_fault_is_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    expected = write(tmp_path / "data", rng, count=60)
    import_shards.run(str(tmp_path / "data"), "mgrounding", str(tmp_path / "out"), processes=1)

    reader = ShardReader(str(tmp_path / "out"))
    found = {}
    for number in range(reader.count):
        sample = reader.read(number).sample
        values = [(one.image, tuple(round(1000 * edge) for edge in one.box)) for one in true_boxes(sample.answer)]
        found[sample.extra["record"]] = values
        assert isinstance(sample.answer, BoxAnswer) == (len(values) == 1)
    assert found == expected, "all boxes, each in its image, and no other"
    parts = json.loads((tmp_path / "out/import.json").read_text())["parts"].values()
    rejected = sum((Counter(part["rejected"]) for part in parts), Counter())
    assert rejected == Counter(FAULTS.values()) and all(
        part["examples"].keys() == part["rejected"].keys() for part in parts
    )
    counted = sum((Counter(part["counts"]["boxes in an answer"]) for part in parts), Counter())
    assert counted == Counter(str(len(boxes)) for boxes in expected.values())
    assert sum(map(len, expected.values())) > 300 and len(expected) == 120
