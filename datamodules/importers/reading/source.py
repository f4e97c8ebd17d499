"""The interface between a source and the import: records by subset, and a function that converts records to samples."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.images.image_files import Frame
from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import LoadedSample, Sample, SampleError

# Entries -> a result for each sample, in order. It runs in other processes, so it must be picklable. A LoadedSample
# contains its images, already checked and upright.
Convert = Callable[[Sequence[Any]], Iterator[Sample | LoadedSample | SampleError]]


MAX_DEPTH = 3  # levels below ROOT in which files of the user's own data are searched


class DataError(UserError, ValueError):
    """The files of a source, or the user's statements on them, cannot be imported. Commands print only the message."""


def find_files(root: Path, pattern: str) -> list[Path]:
    """`root` itself if it is a file; otherwise the matching files below it that are not hidden, sorted."""
    if root.is_file():
        return [root]
    found = (path for depth in range(MAX_DEPTH) for path in root.glob("*/" * depth + pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def name_subset(name: str, path: Path, files: dict[str, Path]) -> str:
    """`name`, the subset of the file `path`. `files` has the files of the subsets so far; this one is added.

    Raises:
        DataError: another file has this subset: train.json and train.jsonl, for example.
    """
    if name in files:
        raise DataError(f"{files[name]} and {path} would both be the subset {name!r}: rename one of them")
    files[name] = path
    return name


def name_record(error: SampleError, record: Any) -> SampleError:
    """Add the record's own id to the error. Without a valid id in `record`, the error is not changed."""
    if not isinstance(record, str | int) or isinstance(record, bool):
        return error
    return SampleError(error.sample_id, error.rule, f"record {str(record)[:80]!r}: {error.detail}")


@dataclass(frozen=True)
class Scan:
    """The content of a source's annotation files, read and checked before any image is read.

    `subsets` has for each subset one small picklable entry per record, in file order. `image_root` is the folder to
    which image names are relative. `report` is `Schema.report()`. `skipped` counts records that are not questions, by
    reason. `frame` is the frame of the boxes in photographs that EXIF rotates: stored, or shown. If it is None,
    questions on such photographs are rejected.
    """

    subsets: dict[str, Sequence[Any]]
    convert: Convert
    image_root: Path
    report: dict[str, Any]
    skipped: dict[str, int] = field(default_factory=dict)
    frame: Frame | None = None


class Spans(Sequence):
    """Rows of `width` integers of 8 bytes, such as the positions (start, end) of records in a large file."""

    def __init__(self, width: int = 2) -> None:
        self.width = width
        # "q" is a signed 64-bit integer, because files may be larger than 4 GB. An array needs no object for each
        # number.
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
