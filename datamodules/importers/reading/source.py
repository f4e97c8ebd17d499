"""What a source hands to the import: its records by subset, and how a record becomes samples."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.images.image_files import Frame
from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import LoadedSample, Sample, SampleError

# Entries -> what became of each of their samples, in order. It runs in other processes, so it must be picklable. A
# LoadedSample brings its images along, already checked and turned upright.
Convert = Callable[[Sequence[Any]], Iterator[Sample | LoadedSample | SampleError]]


MAX_DEPTH = 3  # folders below ROOT in which files of your own data are looked for


class DataError(UserError, ValueError):
    """A source's files, or what the user says of them, cannot be imported: a command prints the message alone."""


def find_files(root: Path, pattern: str) -> list[Path]:
    """`root` itself if it is a file, else the files below it that match and are not hidden, sorted."""
    if root.is_file():
        return [root]
    found = (path for depth in range(MAX_DEPTH) for path in root.glob("*/" * depth + pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def name_record(error: SampleError, record: Any) -> SampleError:
    """The error with the record's own id, by which its authors know it; as it is where `record` is no id."""
    if not isinstance(record, str | int) or isinstance(record, bool):
        return error
    return SampleError(error.sample_id, error.rule, f"record {str(record)[:80]!r}: {error.detail}")


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
    """Rows of `width` integers in 8 bytes each: the places (start, end) of records in a file too large to keep."""

    def __init__(self, width: int = 2) -> None:
        self.width = width
        # "q" is a signed 64-bit integer: files are larger than 4 GB, and an array has no object for each number.
        self.numbers = array("q")

    def append(self, *row: int) -> None:
        """Add one row.

        Raises:
            ValueError: the row has another width.
        """
        if len(row) != self.width:
            raise ValueError(f"a row has {self.width} integers, got {row}")
        self.numbers.extend(row)

    def __len__(self) -> int:
        return len(self.numbers) // self.width

    def __getitem__(self, index: int) -> tuple[int, ...]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return tuple(self.numbers[self.width * index : self.width * (index + 1)])
