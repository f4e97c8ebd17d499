"""Read JSON lines, or one JSON list, in the published formats that `forms.py` describes.

    <root>/train.jsonl, <root>/val.jsonl, …       one record per line, or a .json file with a list
    <root>/images/a.jpg                           names in the records are relative to <root> or `own.images`

ROOT may also be such a file; names are then relative to its folder. A subset is a file, "train" or "part/train".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.importers.own_data.image_folder import ImageFolder
from datamodules.importers.own_data.records import RecordReader, RecordScan
from datamodules.importers.own_data.statement import TRAIN, OwnData
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.json_stream import BOM, MAX_ITEM, stream_json
from datamodules.importers.reading.source import DataError, Scan, Spans, find_files, name_subset
from datamodules.persistence.strict_json import parse_strictly
from datamodules.samples.sample import LoadedSample, SampleError

UTF16 = (b"\xff\xfe", b"\xfe\xff")
DEFAULT_SUBSETS = TRAIN


def root_problems(root: str, own: OwnData) -> list[str]:
    """The problems of ROOT, as messages."""
    return [] if root and Path(root).exists() else [f"root={root!r} is neither a folder nor a file of records"]


def annotation_files(root: Path, own: OwnData) -> list[Path]:
    """The files with records in `root`, or `root` itself; DataError if there is none."""
    files = [path for path in find_files(root, "*.json*") if path == root or _holds_records(path)]
    if not files:
        raise DataError(f"root={str(root)!r}: no .jsonl file, and no .json file that holds a list of records")
    return files


def _holds_records(path: Path) -> bool:
    return path.suffix == ".jsonl" or (path.suffix == ".json" and _first(path) == b"[")


def scan(root: Path, allow: Sequence[str], own: OwnData) -> Scan:
    """Read every record once.

    Raises:
        DataError: a file cannot be read as records, its boxes contradict the stated box format, two files have the same
            name without their ends, or no record has a box.
    """
    # 1. The folder of the images, and the files with records.
    base = root.parent if root.is_file() else root
    folder = ImageFolder(Path(own.images) if own.images else base, own.follow_links, own.frame)
    reader = RecordReader("jsonl", own.dataset_name(root), own, folder)
    schema, skipped, subsets = Schema(allow), Counter({"no_box": 0}), {}
    files = annotation_files(root, own)
    named: dict[str, Path] = {}
    names = [name_subset(path.relative_to(base).with_suffix("").as_posix(), path, named) for path in files]
    # 2. Each file is one subset. Only positions in the files are kept, so that the texts need no memory.
    for number, (path, name) in enumerate(zip(files, names, strict=True)):
        # For each record: its file, its byte range, and its line or position for messages.
        entries = Spans(4)
        look = RecordScan(reader, schema, skipped, images_of=lambda images: images)
        for start, end, position, record in _records(path):
            if isinstance(record, SampleError) or look.look(record, f"{path.name}:{position}"):
                entries.append(number, start, end, position)
        look.finish(path.name)
        if len(entries):
            subsets[name] = entries
    # 3. A file without questions is skipped. If no file has questions, this is an error.
    if not subsets:
        raise DataError(f"root={str(root)!r}: no record has an answer with a box; not imported: {dict(skipped)}")
    convert_entries = partial(convert, reader, tuple(files), tuple(names))
    return Scan(subsets, convert_entries, folder.root, schema.report(), dict(skipped), own.frame)


def convert(
    reader: RecordReader, files: Sequence[Path], names: Sequence[str], entries: Sequence[tuple[int, ...]]
) -> Iterator[LoadedSample | SampleError]:
    """The samples of the records at `entries`: (file, start, end, line)."""
    for number, start, end, position in entries:
        place = f"{names[number]}:{position}"
        with files[number].open("rb") as file:
            file.seek(start)
            record = _decode(file.read(end - start), f"{reader.name}/{place}")
        if isinstance(record, SampleError):
            yield record
        else:
            yield from reader.samples(record, place)


def _records(path: Path) -> Iterator[tuple[int, int, int, dict[str, Any] | SampleError]]:
    """Yields (start, end, position, record) for each record of a file: its byte range, and its line or its index in the
    list, counted from 1. For an invalid record, `record` is the error.

    Raises:
        DataError: the file cannot be read as records at all.
    """
    # UTF-16 would look like broken JSON in every line, so it is reported first.
    if (first := _first(path)) is None:
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    if first == b"[":
        try:
            for position, item in enumerate(stream_json(path), 1):
                yield item.start, item.end, position, _as_record(item.value, f"{path.name}:{position}")
        except ValueError as error:
            raise DataError(f"{error}: the list is not whole, or is no list of records") from error
        return
    # Read as bytes, because byte positions are needed, and because a line that is not UTF-8 must not reject the others.
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        position = 0
        while line := file.readline(MAX_ITEM + 1):
            if len(line) > MAX_ITEM:
                raise DataError(f"{path}, byte {start}: a line of more than {MAX_ITEM:,} bytes; a record is one line")
            position += 1
            if line.strip():
                yield start, start + len(line), position, _decode(line, f"{path.name}:{position}")
            start += len(line)


def _decode(data: bytes, sample_id: str) -> dict[str, Any] | SampleError:
    """One record from strict JSON, or the error of an invalid record: "not_utf8", "bad_json", "field_type"."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return SampleError(sample_id, "not_utf8", f"{error.reason} at byte {error.start} of the record")
    try:
        value = parse_strictly(text)
    except RecursionError:
        return SampleError(sample_id, "bad_json", "its lists and objects are nested too deep")
    except ValueError as error:  # cut short, NaN, a key that is given twice, a number of thousands of digits
        return SampleError(sample_id, "bad_json", f"{error!s:.150}: {text.strip()[:60]!r}")
    return _as_record(value, sample_id)


def _as_record(value: Any, sample_id: str) -> dict[str, Any] | SampleError:
    if isinstance(value, dict):
        return value
    return SampleError(sample_id, "field_type", f"a record is an object, got {type(value).__name__}: {value!r:.80}")


def _first(path: Path) -> bytes | None:
    """The first non-blank character of a file; b"" if there is none; None for UTF-16."""
    with path.open("rb") as file:
        head = file.read(4096)
    return None if head.startswith(UTF16) else head.removeprefix(BOM).lstrip()[:1]
