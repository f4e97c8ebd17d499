"""What every benchmark is. One form for all seven, so that one evaluation serves them.

A benchmark's samples lie in columns, those of the paper's table, and a column in units. A sample's unit is its `task`;
its column is `extra["column"]`, or the unit itself where none is given. `extra["size"]` is the (width, height) that the
annotation was made in, where the files tell it: an image of another size (a resized copy, say) would give boxes another
meaning, so its question counts as wrong under "size_mismatch". Boxes and size are those of the image as it is shown,
which for a photograph that EXIF turns is not as it is stored; `file_benchmark` turns boxes of the stored pixels.
"""

from __future__ import annotations

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
Reader = Literal["project", "mig_bench", "blink", "mmiu"]

# In the source of an official rule whose authors ask a language model where their reader finds no letter.
WITHOUT_MODEL = "without its last step, which asks a language model"


@dataclass(frozen=True)
class Rule:
    """How answers become accuracies. `threshold`, `inclusive` and `box` apply to benchmarks of boxes only."""

    source: str  # where the rule is from
    threshold: float = 0.5  # of the IoU
    inclusive: bool = False  # IoU >= threshold counts too
    box: BoxChoice = "first"
    within: Average = "micro"  # a column: over its questions, or the mean of its units
    across: Average = "macro"  # an average: the mean of its columns, or over their questions
    reader: Reader = "project"  # "project": answer_text.py and choice_text.py; else the official code's own

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"rule: threshold={self.threshold} is an IoU and must lie in 0-1")

    def counts(self, iou: T, threshold: float) -> T:
        """Whether an IoU is a hit at `threshold`: the one comparison behind every Acc@t.

        Args:
            iou: a float, or a tensor of any shape.
            threshold: the rule's own, or another one.
        """
        return iou >= threshold if self.inclusive else iou > threshold


PAPER = "paper §4.1: Acc@0.5, IoU exceeds 0.5"
IN_UNIT = "box in 0-1, not pixels"  # a record that is no question, where the format means pixels


@dataclass(frozen=True)
class Benchmark:
    """Questions, how their images are read, and how answers are scored: as in the paper, and officially."""

    name: str
    samples: tuple[Sample, ...]
    load: Callable[[Sample], LoadedSample]
    rule: Rule
    official: Rule
    averages: Mapping[str, tuple[str, ...]]  # "avg" and others -> their columns; those of "avg" in the table's order
    data: str  # fingerprint of the image files
    dropped: Mapping[str, int] = field(default_factory=dict)  # records that are no question here, by reason

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"{self.name}: no question was found; dropped: {dict(self.dropped)}")
        repeated = [name for name, count in Counter(sample.id for sample in self.samples).items() if count > 1]
        if repeated:  # answers are kept by id: one question would get the other's
            raise ValueError(f"{self.name}: {len(repeated)} ids name several questions, such as {repeated[0]!r}")
        unknown = {column_of(sample) for sample in self.samples} - set(self.averages["avg"])
        if unknown:
            raise ValueError(f"{self.name}: columns {sorted(unknown)} stand in no average")


def column_of(sample: Sample) -> str:
    return sample.extra.get("column", sample.task)


def limit_columns(samples: Sequence[Sample], limit: int | None) -> tuple[Sample, ...]:
    """At most `limit` samples of each column, spread evenly over the file (neighbours there are alike)."""
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
    """A benchmark's sample, with all images before the question.

    It is validated, but for the answer's box, which is scored as it is, dirty or not.

    Args:
        source: name of the benchmark; with `name` it makes the sample's id.
        name: of the question in the benchmark.
        task: the sample's unit.
        images: names of the image files.
        question: the text after the images.
        answer: {"image", "box", "label"} or {"letter", "choices"}.
        extra: the column, the size of the annotation and others.
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
    """A benchmark whose samples name image files.

    Args:
        name: of the benchmark.
        samples: its questions; boxes and sizes are in `frame`.
        folder: the image names begin here.
        rule, official: how answers are scored, after the paper and officially.
        averages: names of averages, with the columns that each is over.
        dropped: numbers of records that are no questions, by reason.
        frame: the frame in which the benchmark's authors read images. In the result, boxes and sizes are those of the
            images as they are shown.
    """
    # 1. All later code sees boxes of the image as it is shown.
    turned = 0
    if frame == "stored":
        samples, turned = turn_questions(samples, folder)
    # 2. The fingerprint is part of the key of kept answers: other image files must be asked again.
    data = files_fingerprint(folder, sorted({image for sample in samples for image in sample.images}))
    load = partial(load_images, image_root=folder)
    notes = {**(dropped or {})} | ({TURNED: turned} if turned else {})
    return Benchmark(name, tuple(samples), load, rule, official, averages, data, notes)


def files_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Hash of files by name and size in bytes. A missing file counts as missing, and is refused when it is read."""
    return fingerprint([(name, file_size(folder / name)) for name in names])


def by_id(records: Any, what: str, where: str) -> dict[int | str, Mapping[str, Any]]:
    """COCO's records by their ids.

    Raises ValueError for a record without an id, and for an id that two records have: other records refer to it, and
    nothing says which of the two they mean.
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
    """Raise ValueError for an id that an earlier record has.

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
