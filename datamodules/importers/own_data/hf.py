"""Data sets of Hugging Face's library `datasets`: a folder saved by it, a folder of files that it reads, or a Hub name.

    <root>/state.json, data-*.arrow              `save_to_disk`, also <root>/<split>/… of a DatasetDict
    <root>/**.parquet, or metadata.jsonl beside images   what `load_dataset` reads
    org/name                                     the Hub's

A row is a record as in `forms.py`. Its images are bytes in the row, or file names below ROOT. Detection data sets have
`image` and `objects`: {"bbox": [four numbers, …], "category": [a name or a number, …]} (huggingface.co/docs/datasets,
"Object detection"); their box format differs between data sets, so the user states it. A subset is a split.

Only this file imports the library, which is installed by the extra `hf`. It writes converted data to its cache folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datamodules.importers.own_data.drafts import draft_record
from datamodules.importers.own_data.image_folder import ImageFolder
from datamodules.importers.own_data.records import RecordReader, RecordScan
from datamodules.importers.own_data.statement import TRAIN, OwnData
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.source import DataError, Scan, Spans
from datamodules.samples.sample import LoadedSample, SampleError

DEFAULT_SUBSETS = TRAIN
BATCH = 1000  # rows that the scan reads at a time, without images
IMAGE_COLUMNS = ("image", "images")
# fields of `objects` with numbers of categories; the data set's features have the names
NAMED = ("category", "categories", "label", "labels")


def root_problems(root: str, own: OwnData) -> list[str]:
    """The problems of ROOT or of this machine, as messages."""
    problems = [] if root else ["root='': a folder, or a name on the Hub such as org/name, is needed"]
    try:
        import datasets  # noqa: F401
    except ImportError:
        problems.append("source='hf' needs the package datasets: pip install 'multi-image-grounding[hf]'")
    return problems


def annotation_files(root: Path, own: OwnData) -> list[Path]:
    """The arrow files from which the library reads the rows, including embedded images."""
    _open.cache_clear()  # the content of the folder may have changed
    splits = _open(str(root), own.config)
    return sorted({Path(file["filename"]) for split in splits.values() for file in split.cache_files})


def scan(root: Path, allow: Sequence[str], own: OwnData) -> Scan:
    """Read every row once, without its images.

    Raises:
        DataError: the library cannot read the data set, its boxes contradict the stated box format, or it has no box.
    """
    # 1. The data set (no rows are read yet), and the image folder of all splits.
    splits = _open(str(root), own.config)
    folder = ImageFolder(_image_root(root, own), own.follow_links, own.frame)
    schema, skipped, subsets, names = Schema(allow), Counter({"no_box": 0}), {}, None
    # 2. Each split: rows without images, so that the scan of a large data set reads only texts.
    for number, (split, rows) in enumerate(splits.items()):
        # All splits of a data set number their categories in the same way, so the first names found are used for all.
        names = names or _category_names(rows.features)
        reader = RecordReader("hf", own.dataset_name(root), _with_names(own, names), folder)
        look = RecordScan(reader, schema, skipped, partial(_images_of, reader.own, rows))
        entries = Spans()
        for row, record in _without_images(rows, own):
            if look.look(record, f"{split}:{row}", row):
                entries.append(number, row)
        look.finish(split)
        if len(entries):
            subsets[split] = entries
    if not subsets:
        raise DataError(f"root={str(root)!r}: no row has an answer with a box; not imported: {dict(skipped)}")
    # 3. The converter of the import, with the names of categories found above.
    reader = RecordReader("hf", own.dataset_name(root), _with_names(own, names), folder)
    return Scan(subsets, partial(convert, reader, str(root)), folder.root, schema.report(), dict(skipped), own.frame)


def convert(
    reader: RecordReader, root: str, entries: Sequence[tuple[int, int]]
) -> Iterator[LoadedSample | SampleError]:
    """The samples of the rows at `entries`: (number of the split, row)."""
    splits = list(_open(root, reader.own.config).items())
    for number, row in entries:
        split, rows = splits[number]
        yield from reader.samples(_row(rows, row), f"{split}:{row}")


@lru_cache(maxsize=4)
def _open(root: str, config: str | None) -> dict[str, Any]:
    """{split: rows} of the data set, {"all": rows} without splits. Rows are as in the file, with images as bytes."""
    import datasets

    try:
        if (Path(root) / "state.json").is_file() or (Path(root) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(root)
        else:
            found = datasets.load_dataset(root, config)
    except Exception as error:  # the library raises many types: errors of files, network and formats
        raise DataError(f"root={root!r}: the library datasets cannot read it: {error!s:.500}") from error
    splits = dict(found) if isinstance(found, Mapping) else {"all": found}
    # The arrow format keeps images as bytes; the default format would decode every image.
    return {name: rows.with_format("arrow") for name, rows in splits.items()}


def _row(rows: Any, row: int) -> dict[str, Any]:
    (record,) = rows[row].to_pylist()
    return record


def _without_images(rows: Any, own: OwnData) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) for all rows. Each image is replaced by a name, so no image bytes are read."""
    import pyarrow

    # Images are structs of bytes and path. They are replaced before rows become Python objects.
    columns = [own.fields.get(name, name) for name in IMAGE_COLUMNS]
    for start in range(0, len(rows), BATCH):
        table = rows[start : min(start + BATCH, len(rows))]
        for column in set(columns) & set(table.column_names):
            values = table.column(column)
            if not _holds_bytes(values.type):
                continue
            stand_in: Any = [None if not value.is_valid else "image" for value in values]
            if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
                stand_in = [None if not value.is_valid else ["image"] * len(value) for value in values]
            table = table.set_column(table.column_names.index(column), column, [stand_in])
        for number, record in enumerate(table.to_pylist()):
            yield start + number, record


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type is the library's image, {"bytes", "path"}, or a list of it."""
    import pyarrow

    # A column with several images is a list of structs, so the innermost type is checked.
    while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    return pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _images_of(own: OwnData, rows: Any, row: int) -> tuple[Any, ...]:
    """The images of one row, for their sizes. Raises SampleError as `draft_record`."""
    return draft_record(_row(rows, row), own, f"row {row}").images


def _category_names(features: Mapping[str, Any]) -> list[str] | None:
    """The names of the categories in `objects`, if the features of the data set contain them."""
    objects = features.get("objects")
    # A list of objects is a Sequence feature with the fields in `feature`; otherwise the fields are there directly.
    fields = getattr(objects, "feature", objects)
    if not isinstance(fields, Mapping):
        return None
    for name in NAMED:
        inner = fields.get(name)
        inner = getattr(inner, "feature", inner)
        if hasattr(inner, "names"):
            return list(inner.names)
    return None


def _with_names(own: OwnData, names: list[str] | None) -> OwnData:
    """The user's statements. If the user gives no category names, those of the data set are added."""
    return own if own.categories or not names else replace(own, categories=names)


def _image_root(root: Path, own: OwnData) -> Path:
    """The folder to which image names are relative: the stated one, ROOT, or the library's cache for a Hub data set."""
    if own.images or root.is_dir():
        return Path(own.images) if own.images else root
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)
