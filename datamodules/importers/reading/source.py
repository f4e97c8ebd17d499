"""What a source hands to the import: its records by subset, and how a record becomes samples."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.images.image_files import Frame
from datamodules.samples.sample import Sample, SampleError

# Entries -> what became of each of their samples, in order. It runs in other processes, so it must be picklable.
Convert = Callable[[Sequence[Any]], Iterator[Sample | SampleError]]


@dataclass(frozen=True)
class Scan:
    """A source's annotation files, read and checked before an image is touched.

    `subsets` has for each subset one small picklable entry a record, in file order; `image_root` is where the samples'
    image names begin; `report` is `Schema.report()`, `skipped` how many records are no questions of this kind, and why.
    `frame` says in which pixels boxes of a photograph that EXIF turns were measured: as stored, or as shown. None where
    nothing says which: questions on such photographs are rejected.
    """

    subsets: dict[str, Sequence[Any]]
    convert: Convert
    image_root: Path
    report: dict[str, Any]
    skipped: dict[str, int] = field(default_factory=dict)
    frame: Frame | None = None


class Spans(Sequence):
    """(start, end) pairs in 16 bytes each: the places of records in a file too large to keep."""

    def __init__(self) -> None:
        self.numbers = array("q")

    def append(self, start: int, end: int) -> None:
        self.numbers.extend((start, end))

    def __len__(self) -> int:
        return len(self.numbers) // 2

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.numbers[2 * index], self.numbers[2 * index + 1]
