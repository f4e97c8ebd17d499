"""The common form of all benchmarks, so that one evaluation serves them all.

The samples of a benchmark are grouped into the columns of the paper's table, and each column into units. The unit of a
sample is its `task`. Its column is `extra["column"]`, or the unit if `extra` has no column. `extra["size"]` is the
(width, height) of the annotated image, if the files contain it; of several boxes, `extra["sizes"]` has the size of each
image. If the image file has another size, the boxes would be wrong, so the question counts as wrong with the reason
"size_mismatch". Boxes and sizes refer to the image as it is shown, after the rotation by EXIF. `file_benchmark`
converts boxes that refer to the stored pixels.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from datamodules.benchmarks.reading.upright import TURNED, turn_questions
from datamodules.images.image_files import Frame, file_size, load_images
from datamodules.persistence.files import fingerprint
from datamodules.samples.sample import LoadedSample, Sample
from datamodules.samples.scores import BoxChoice

T = TypeVar("T")
Average = Literal["micro", "macro"]
Reader = Literal["project", "mig_bench", "blink", "mmiu", "mc_bench"]
Measure = Literal["accuracy", "average_precision"]

# A part of `source`, for official rules whose authors ask a language model if their parser finds no letter.
WITHOUT_MODEL = "without its last step, which asks a language model"


@dataclass(frozen=True)
class Rule:
    """How answers become accuracies. `threshold`, `inclusive` and `box` are only for benchmarks with boxes."""

    source: str  # where the rule was published
    threshold: float = 0.5  # for the IoU
    inclusive: bool = False  # IoU >= threshold counts too
    box: BoxChoice = "first"
    within: Average = "micro"  # accuracy of a column: mean over its questions, or mean over its units
    across: Average = "macro"  # an average: mean over its columns, or mean over their questions
    # "project": answer_text.py and choice_text.py; other values: the parser of the official code
    reader: Reader = "project"
    # "average_precision": COCO's AP at the threshold, weighted over groups (`detections.py`); `within` has no meaning
    # then
    measure: Measure = "accuracy"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"rule: threshold={self.threshold} is an IoU and must lie in 0-1")

    @property
    def exceeded(self) -> float:
        """What an IoU exceeds where it counts at the rule's own threshold; for functions that compare with >."""
        return math.nextafter(self.threshold, -math.inf) if self.inclusive else self.threshold

    def counts(self, iou: T, threshold: float) -> T:
        """Whether an IoU is a hit at `threshold`. Every Acc@t uses this comparison.

        Args:
            iou: a float, or a tensor of any shape.
            threshold: the threshold of the rule, or another one.
        """
        return iou >= threshold if self.inclusive else iou > threshold


PAPER = "paper §4.1: Acc@0.5, IoU exceeds 0.5"
NUMBER, ID = int | float, int | str
KINDS: Mapping[Any, str] = {str: "text", list: "a list", Mapping: "an object", NUMBER: "a number", ID: "an id"}
IN_UNIT = "box in 0-1, not pixels"  # reason for which a record is dropped, if the format requires pixels


@dataclass(frozen=True)
class Benchmark:
    """The questions, how their images are read, and how answers are scored by the paper and by the official code."""

    name: str
    samples: tuple[Sample, ...]
    load: Callable[[Sample], LoadedSample]
    rule: Rule
    official: Rule
    # name of an average, such as "avg" -> its columns; the columns of "avg" are in the order of the table
    averages: Mapping[str, tuple[str, ...]]
    data: str  # fingerprint of the image files
    # reason -> number of records that are not used as questions
    dropped: Mapping[str, int] = field(default_factory=dict)
    # Whether the image that a model names counts in questions of one box too. Published measures do not know it.
    image_counts: bool = False

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"{self.name}: no question was found; dropped: {dict(self.dropped)}")
        repeated = [name for name, count in Counter(sample.id for sample in self.samples).items() if count > 1]
        if repeated:  # answers are stored by id, so one question would get the other's answer
            raise ValueError(f"{self.name}: {len(repeated)} ids name several questions, such as {repeated[0]!r}")
        unknown = {column_of(sample) for sample in self.samples} - set(self.averages["avg"])
        if unknown:
            raise ValueError(f"{self.name}: columns {sorted(unknown)} stand in no average")


def column_of(sample: Sample) -> str:
    return sample.extra.get("column", sample.task)


def limit_columns(samples: Sequence[Sample], limit: int | None) -> tuple[Sample, ...]:
    """At most `limit` samples of each column, spread evenly over the file, because neighbouring records are similar."""
    if limit is None:
        return tuple(samples)
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    columns: dict[str, list[Sample]] = {}
    for sample in samples:
        columns.setdefault(column_of(sample), []).append(sample)
    return tuple(
        # Evenly spread without a random choice, so a rerun asks the same questions.
        members[index * len(members) // min(limit, len(members))]
        for members in columns.values()
        for index in range(min(limit, len(members)))
    )


def make_sample(
    source: str, name: object, task: str, images: Sequence[str], question: str, answer: Mapping[str, Any], **extra: Any
) -> Sample:
    """Build a validated sample of a benchmark, with all images before the question.

    Only the answer's box is not validated: it is scored as the file has it.

    Args:
        source: name of the benchmark; the sample's id is made of `source` and `name`.
        name: name of the question in the benchmark.
        task: the unit of the sample.
        images: names of the image files.
        question: the text after the images.
        answer: {"image", "box", "label"} or {"letter", "choices"}.
        extra: further fields, such as the column and the size of the annotated image.
    """
    messages = [*({"type": "image", "image": k} for k in range(len(images))), {"type": "text", "text": question}]
    record = {"id": f"{source}/{name}", "source": source, "task": task, "images": images, "messages": messages}
    return Sample.from_json({**record, "answer": answer, "extra": extra}, strict_boxes=False)


def file_benchmark(
    name: str,
    samples: Sequence[Sample],
    folder: Path,
    rule: Rule,
    official: Rule,
    averages: Mapping[str, tuple[str, ...]],
    dropped: Mapping[str, int] | None = None,
    *,
    frame: Frame,
) -> Benchmark:
    """Build a benchmark whose samples name image files.

    Args:
        name: name of the benchmark.
        samples: its questions; boxes and sizes are in `frame`.
        folder: the image names are relative to this folder.
        rule, official: how the paper and the official code score answers.
        averages: names of averages, each with its columns.
        dropped: reason -> number of records that are not used as questions.
        frame: whether the benchmark's authors read images as stored or as shown. In the result, boxes and sizes always
            refer to the images as shown.
    """
    # 1. Convert the boxes: all later code expects boxes of the image as it is shown.
    turned = 0
    if frame == "stored":
        samples, turned = turn_questions(samples, folder)
    # 2. The fingerprint is part of the key of stored answers, so changed image files are asked again.
    data = files_fingerprint(folder, sorted({image for sample in samples for image in sample.images}))
    load = partial(load_images, image_root=folder)
    notes = {**(dropped or {})} | ({TURNED: turned} if turned else {})
    return Benchmark(name, tuple(samples), load, rule, official, averages, data, notes)


def files_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Hash of the names and sizes (in bytes) of files. A missing file changes the hash; reading it fails later."""
    return fingerprint([(name, file_size(folder / name)) for name in names])


def by_id(records: Any, what: str, where: str) -> dict[int | str, Mapping[str, Any]]:
    """Index COCO records by their ids.

    Raises ValueError for a record without an id, and for two records with the same id, because a reference to this id
    would be ambiguous.
    """
    found: dict[int | str, Mapping[str, Any]] = {}
    for position, record in enumerate(records):
        require_fields(record, ("id",), f"{where}: {what}[{position}]")
        number = record["id"]
        if isinstance(number, bool) or not isinstance(number, int | str):
            raise ValueError(f"{where}: {what}[{position}]: id={number!r:.80} is neither a number nor a text")
        refuse_repeated(number, found, f"{where}: {what}[{position}]")
        found[number] = record
    return found


def refuse_repeated(number: int | str, known: Container[int | str], where: str, field: str = "id") -> None:
    """Raise ValueError if an earlier record has the same id.

    Args:
        number: the id.
        known: ids of the earlier records.
        where: file and position of the record, for the message.
        field: the record's field that holds the id.
    """
    if number in known:
        raise ValueError(
            f"{where}: field {field!r} is {number!r:.80}, as of an earlier record: each needs an id of its own"
        )


def require_fields(record: Any, names: Sequence[str], where: str) -> None:
    """Raise ValueError that names the fields which `record` lacks."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, list(record)[:20]))}")


def require_types(record: Mapping[str, Any], where: str, **kinds: Any) -> None:
    """Raise ValueError that names a field of `record` with a value of another type; `kinds` are keys of `KINDS`.

    None in a text would be the word "None" in a question.
    """
    for name, kind in kinds.items():
        if isinstance(record[name], bool) or not isinstance(record[name], kind):
            raise ValueError(f"{where}: {name}={record[name]!r:.80} is not {KINDS[kind]}")


def is_xywh(value: Any) -> bool:
    """Whether the value of a field is a list of four finite numbers."""
    numbers = value if isinstance(value, list) and len(value) == 4 else [None]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)


def read_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file, FileNotFoundError without the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    require_fields(record, (), str(path))
    return record
