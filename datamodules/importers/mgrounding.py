"""MGrounding-630k (Li et al., "Migician"): one JSON list for all subsets, and a folder of images for each.

    {"id": "11_22", "images": ["./MGrounding-630k/Group_Grounding/SA-1B/sa_11.jpg", …], "type": "gg_train",
     "conversations": [
        {"from": "human", "value": "<image>\\n<image>\\nGive the box of <|object_ref_start|>a kite<|object_ref_end|>."},
        {"from": "gpt", "value": "It's in the second image. <|box_start|>(316,58),(764,999)<|box_end|>"}]}

Boxes are in 0-1000, relative to their image. Only the wording of the turn says which image that is. A question is a
human turn with the answer that follows it; it is asked about all images of the record. The subset is read from the
path; `type` is only counted. The authors read images as they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.benchmarks.mig_bench import relative_name
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.image_references import BOX, bind, label_before, question_parts
from datamodules.importers.reading.json_stream import stream_json
from datamodules.importers.reading.source import Scan, Spans, name_record
from datamodules.samples.sample import Sample, SampleError

NAME = "MGrounding-630k"
ANNOTATIONS = f"{NAME}.json"
IMAGE_TAG = "<image>"
DEFAULT_SUBSETS = ("*",)

# Folder -> name of the task; if MIG-Bench has the task, its name.
SUBSETS = {
    "Common_Object": "common_object",
    "Difference": "diff",
    "Free-Form": "free_form",
    "Group_Grounding": "group_grounding",
    "Object_Tracking": "object_tracking",
    "Referring_Grounding": "refer_grounding",
    "Region_Locating": "region",
}
# As in MIG-Bench: the answer of "region" is in the first image, because the number in its question counts crops, not
# images ...
FIXED = {"region": 0}
# ... and these answers are in the second image if the text names no image.
SILENT = {"diff": 1, "refer_grounding": 1}
_FIELDS = {"id": str, "images": list, "conversations": list, "type": str}
_TURN = {"from": str, "value": str}
# Folders above the data set's folder in archives that were made from the root of a disk.
MAX_DEPTH = 5


def annotation_files(root: Path) -> list[Path]:
    """The only JSON file; ValueError if there is none."""
    for folder in (root, root / NAME):
        if (folder / ANNOTATIONS).is_file():
            return [folder / ANNOTATIONS]
    raise ValueError(f"root={str(root)!r}: neither {ANNOTATIONS} nor {NAME}/{ANNOTATIONS} is in it")


def scan(root: Path, allow: Sequence[str] = ()) -> Scan:
    """Check the fields of every record and store its position. Raises ValueError for an unexpected field."""
    (path,) = annotation_files(root)
    # Records stay on disk. Only their byte ranges are kept; workers read the records again.
    schema, skipped = Schema(allow), {"region_to_text": 0}
    subsets = {task: Spans() for task in SUBSETS.values()}
    for number, item in enumerate(stream_json(path)):
        where = f"{path.name}[{number}]"
        if item.key:
            raise ValueError(f"{path}: a list of records is expected, found an object with the key {item.key!r}")
        task = _check(schema, item.value, where)
        # The kind of question depends on which side of the conversation writes boxes.
        boxed = {turn["from"] for turn in item.value["conversations"] if BOX.search(turn["value"])}
        if boxed == {"human"}:
            skipped["region_to_text"] += 1  # the question asks to describe a box, so the answer is text
        else:
            subsets[task].append(item.start, item.end)
    # A partial download may lack whole subsets, so empty subsets are skipped.
    filled = {task: spans for task, spans in subsets.items() if len(spans)}
    if not filled:
        raise ValueError(f"{path} holds no record")
    return Scan(filled, partial(convert, path), image_root(root), schema.report(), skipped, frame="stored")


def image_root(root: Path) -> Path:
    """The folder to which the paths in the JSON are relative, at most a few levels below `root`.

    Raises ValueError unless exactly one such folder contains a subset.
    """
    root = root.absolute()
    holding: list[Path] = []
    # the search stops at the first level that has one, because deeper levels may hold millions of files
    for depth in range(-1, MAX_DEPTH):
        found = sorted(root.glob("*/" * depth + NAME)) if depth >= 0 else [root]
        holding = [path for path in found if path.name == NAME and any((path / subset).is_dir() for subset in SUBSETS)]
        if holding:
            break
    if len(holding) != 1:
        raise ValueError(
            f"root={str(root)!r}: exactly one folder {NAME} with subsets ({', '.join(SUBSETS)}) should be in it, found"
            f" {[str(path) for path in holding]}"
        )
    return holding[0].parent


def _check(schema: Schema, record: Any, where: str) -> str:
    """Check the structure of one record and return its task."""
    schema.check("record", record, where, _FIELDS)
    if not record["images"] or not all(isinstance(name, str) for name in record["images"]):
        raise ValueError(f"{where}: field 'images' should be file names, found {record['images']!r:.200}")
    for position, turn in enumerate(record["conversations"]):
        schema.check("turn", turn, f"{where}.conversations[{position}]", _TURN)
        if turn["from"] not in ("human", "gpt"):
            raise ValueError(f"{where}.conversations[{position}]: field 'from' is {turn['from']!r}, not human or gpt")
    # The folder below the data set's name is the subset; PurePosixPath removes a leading "./".
    parts = PurePosixPath(record["images"][0]).parts
    subset = parts[1] if len(parts) > 2 and parts[0] == NAME else None
    if subset not in SUBSETS:
        raise ValueError(f"{where}: field 'images' is {record['images'][0]!r}, not ./{NAME}/<{'|'.join(SUBSETS)}>/…")
    schema.count("subset, type", f"{subset}, {record['type']}")
    schema.count("images a record", str(len(record["images"])))
    return SUBSETS[subset]


def convert(path: Path, spans: Sequence[tuple[int, int]]) -> Iterator[Sample | SampleError]:
    """Read the records at `spans`; returns a sample or an error for each question."""
    with path.open("rb") as file:
        for start, end in spans:
            file.seek(start)
            yield from record_samples(json.loads(file.read(end - start)), start)


def record_samples(record: Mapping[str, Any], place: int) -> Iterator[Sample | SampleError]:
    """Convert one record. `place` makes ids unique, because the record's own id may not be. Errors name both."""
    for sample in _questions(record, place):
        yield name_record(sample, record["id"]) if isinstance(sample, SampleError) else sample


def _questions(record: Mapping[str, Any], place: int) -> Iterator[Sample | SampleError]:
    """A sample or an error for each question of a record."""
    # 1. The record as a whole: an error here rejects all of its questions.
    task = SUBSETS[PurePosixPath(record["images"][0]).parts[1]]
    name = f"mgrounding/{task}/{place}"
    turns = record["conversations"]
    roles = [turn["from"] for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2) or not turns:
        yield SampleError(name, "turn_order", f"conversations are {roles}, not human and gpt in turn")
        return
    # Every image must be shown in the first turn, because a later tag would change the order of the images.
    tags = [turn["value"].count(IMAGE_TAG) for turn in turns]
    if tags[0] != len(record["images"]) or any(tags[1:]):
        yield SampleError(name, "image_tags", f"{tags} tags in the turns for {len(record['images'])} images")
        return
    # 2. Each question alone: an error in one question does not reject the others.
    for number, (human, gpt) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        try:
            yield _sample(record, task, f"{name}/{number}", human["value"], gpt["value"])
        except SampleError as error:
            yield error


def _sample(record: Mapping[str, Any], task: str, name: str, question: str, answer: str) -> Sample:
    num_images = len(record["images"])
    parts = question_parts(question, num_images, name, IMAGE_TAG)
    rules = {"fixed": FIXED.get(task), "silent": SILENT.get(task), "in_order": task == "object_tracking"}
    marked, source = bind(answer, question, num_images, name, **rules)
    labels = [label_before(answer, box.start) or label_before(question) for box in marked]
    boxes = [
        {"image": box.image, "box": list(box.box), "label": label} for box, label in zip(marked, labels, strict=True)
    ]
    return Sample.from_json(
        {
            "id": name,
            "source": "mgrounding",
            "task": task,
            "images": [relative_name(image, name) for image in record["images"]],
            "messages": parts,
            "answer": boxes[0] if len(boxes) == 1 else {"boxes": boxes},
            "extra": {"image_from": source, "record": record["id"], "type": record["type"]},
        }
    )
