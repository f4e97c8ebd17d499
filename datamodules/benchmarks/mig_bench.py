"""MIG-Bench (Li et al., "Migician"): read its JSON into samples. The nano benchmark has the same format and tasks.

One record, with exactly these keys:

    {"task": "region", "images": ["./MIG-Bench/images/region/a.jpg", "./MIG-Bench/images/region/a_1.jpg"],
     "question": "… Please locate the 1th region picture in the source image. ", "answer": [0.421, 0.104, 0.606, 0.507],
     "additional_info": "", "need_format": true}

`answer` is a box (xyxy, 0-1) in one of the images. The file does not say in which image (see `target_image`). The id of
a record is its position. The official code shows images as they are stored, so the boxes refer to the stored pixels.
They are rotated together with photographs that EXIF rotates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.benchmarks.base import PAPER, Benchmark, Rule, file_benchmark
from datamodules.images.image_files import file_size
from datamodules.samples.boxes import box_fault
from datamodules.samples.sample import Sample, SampleError

# In the order of the paper's table, whose columns are Static, Robust, Common, OT, MV, Region, Refer, GG, Reason, Co-Re.
TASKS = (
    "diff",
    "view_diff",
    "common_object",
    "object_tracking",
    "multi_view",
    "region",
    "refer_grounding",
    "group_grounding",
    "reasoning",
    "correspondence",
)
IN_DOMAIN = ("diff", "common_object", "region", "refer_grounding")
OUT_OF_DOMAIN = tuple(task for task in TASKS if task not in IN_DOMAIN)

NAME, FOLDER, ANNOTATIONS, IMAGES = "mig_bench", "MIG-Bench", "MIG_data.json", "images"
AVERAGES = {"avg": TASKS, "in_domain": IN_DOMAIN, "out_of_domain": OUT_OF_DOMAIN}
RULE = Rule(source=PAPER + ", mean over tasks")
OFFICIAL = Rule(source="Migician eval/utils.py: its own box reader, IoU >= 0.5", inclusive=True, reader="mig_bench")

_FIELDS = {"task": str, "images": list, "question": str, "answer": list, "additional_info": str, "need_format": bool}
_SECOND_IMAGE = ("correspondence", "diff", "view_diff", "refer_grounding", "reasoning")
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    *("eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth"),
    *("nineteenth", "twentieth"),
)
_NUMBERED = re.compile(r"\bin the (\d+)th image\b")  # "1th" is literal
_NAMED = re.compile(r"\bIt is in the (\w+) image\b")
_QUERY_BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")  # in 0-1000, of image 0


def load(root: Path) -> Benchmark:
    """Load the benchmark. `root` has MIG_data.json and images/, and must be named MIG-Bench, as in the image names."""
    return load_files(root / ANNOTATIONS, root.parent)


def load_files(annotations: str | Path, image_root: str | Path) -> Benchmark:
    """Load a benchmark from any file in this format; `image_root` is the folder that contains "MIG-Bench/".

    Raises FileNotFoundError for missing images, and the errors of `load_mig_bench`.
    """
    samples = load_mig_bench(annotations)
    _check_images(samples, Path(image_root))
    # strict_boxes=False accepts invalid boxes. They are counted here, so that the report shows them.
    dirty = sum(box_fault(sample.answer.box) is not None for sample in samples)
    # The box is empty or leaves the image. It is kept, because the official code scores it as it is.
    notes = {"kept: dirty answer box": dirty} if dirty else {}
    return file_benchmark(NAME, samples, Path(image_root), RULE, OFFICIAL, AVERAGES, notes, frame="stored")


def load_mig_bench(path: str | Path) -> list[Sample]:
    """Samples "mig_bench/<position>" in file order, all images first and then the question, as in the official prompt.

    Boxes are those of the file and refer to the stored pixels. `additional_info` is not copied into a sample, because
    for group_grounding it contains the answer. Raises ValueError if the file is not a JSON list, and SampleError for a
    record of another format.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a list of records, found {type(records).__name__} without any")
    return [_sample(record, position) for position, record in enumerate(records)]


def target_image(record: Mapping[str, Any]) -> int:
    """0-based index of the image to which `answer` refers.

    The file does not contain it. This rule follows from the questions, the file names and the official code's prompts.
    For region it is the source image, because the number in the question counts crops. For the two-image tasks it is
    the second image. For common_object, multi_view and object_tracking it is the number in the question. For
    group_grounding it is the ordinal in `additional_info`. Raises ValueError if the needed wording is not found exactly
    once, or names no image.
    """
    task = record["task"]
    if task == "region":
        index = 0
    elif task in _SECOND_IMAGE:
        index = 1
    elif task == "group_grounding":
        index = ORDINALS.index(_only(_NAMED, record["additional_info"], "additional_info"))
    else:
        index = int(_only(_NUMBERED, record["question"], "question")) - 1
    if not 0 <= index < len(record["images"]):
        raise ValueError(f"the {task} answer should be in image {index + 1} of {len(record['images'])}")
    return index


def _only(pattern: re.Pattern[str], text: str, field: str) -> str:
    found = pattern.findall(text)
    if len(found) != 1 or not (found[0].isdigit() or found[0] in ORDINALS):
        raise ValueError(f"{field} should name its image once ({pattern.pattern}), found {found} in {text[:200]!r}")
    return found[0]


def _sample(record: Any, position: int) -> Sample:
    sample_id = f"mig_bench/{position}"
    _check_fields(record, sample_id)
    if record["task"] not in TASKS:
        raise SampleError(sample_id, "unknown_task", f"task is {record['task']!r}, not one of {', '.join(TASKS)}")
    try:
        target = target_image(record)
    except ValueError as error:
        raise SampleError(sample_id, "target_image", str(error)) from error
    parts = [{"type": "image", "image": index} for index in range(len(record["images"]))]
    return Sample.from_json(
        {
            "id": sample_id,
            "source": "mig_bench",
            "task": record["task"],
            "images": [relative_name(name, sample_id) for name in record["images"]],
            "messages": parts + _question_parts(record["question"]),
            "answer": {"image": target, "box": record["answer"], "label": ""},
        },
        strict_boxes=False,
    )


def _check_fields(record: Any, sample_id: str) -> None:
    if not isinstance(record, Mapping):
        raise SampleError(sample_id, "field_type", f"a record is an object, got {type(record).__name__}")
    if missing := [name for name in _FIELDS if name not in record]:
        raise SampleError(sample_id, "missing_field", ", ".join(missing))
    if unknown := [str(name) for name in record if name not in _FIELDS]:
        raise SampleError(sample_id, "unknown_field", ", ".join(unknown))
    for name, kind in _FIELDS.items():
        if not isinstance(record[name], kind):
            raise SampleError(sample_id, "field_type", f"{name} is {type(record[name]).__name__}, not {kind.__name__}")


def relative_name(name: Any, sample_id: str) -> str:
    """The image name without its leading "./"; SampleError "image_path" if it leads out of the image root."""
    if not isinstance(name, str):
        raise SampleError(sample_id, "field_type", f"images holds {type(name).__name__}, not only str")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(sample_id, "image_path", f"images holds {name!r}, which leaves the image folder")
    return str(path)


def _question_parts(question: str) -> list[dict[str, Any]]:
    """Split the question into text parts and box parts. Joined, they give the question again."""
    parts: list[dict[str, Any]] = []
    done = 0
    for match in _QUERY_BOX.finditer(question):
        # From 0-1000 to 0-1. The original text is kept too, because the official prompt contains it.
        box = [int(number) / 1000 for number in match.groups()]
        parts.append({"type": "text", "text": question[done : match.start()]})
        parts.append({"type": "box", "image": 0, "box": box, "text": match.group()})
        done = match.end()
    parts.append({"type": "text", "text": question[done:]})
    return [part for part in parts if part.get("text")]


def _check_images(samples: list[Sample], image_root: Path) -> None:
    # In reverse order, so that the id of the first sample is kept for equal names.
    names = {name: sample.id for sample in reversed(samples) for name in reversed(sample.images)}
    missing = [name for name in reversed(names) if file_size(image_root / name) is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} benchmark images are not below {image_root}, the first is {missing[0]}"
            f" of {names[missing[0]]}: the folder must be the one that holds MIG-Bench/images"
        )
