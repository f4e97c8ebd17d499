"""Read rows and images of Parquet files. Images are read one row group at a time, so that memory stays constant."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

NUM_CACHED_GROUPS = 4
# Predictors that wait for a server read in several threads. Without the lock, each thread would load the same row
# group.
_READING = threading.Lock()


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read columns of all rows. Raises ValueError that names missing columns, FileNotFoundError without the file."""
    file = _open(str(path))
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
    return file.read(columns=list(columns)).to_pylist()


def row_bytes(path: Path, row: int, columns: Sequence[str]) -> list[bytes]:
    """The encoded images of one row, in the order of `columns` (Hugging Face's image struct, {"bytes", "path"})."""
    file = _open(str(path))
    group = 0
    # Parquet reads whole row groups: find the group and the row's position in it.
    while row >= (size := file.metadata.row_group(group).num_rows):
        row, group = row - size, group + 1
    with _READING:
        values = _group(str(path), group, tuple(columns))
    return [values[name][row].as_py()["bytes"] for name in columns]


def null_columns(path: Path, columns: Sequence[str]) -> list[set[str]]:
    """For each row, which of these columns are null; images are not decoded to Python.

    Raises ValueError for an image that is not null and has no bytes, such as one that names a file.
    """
    import pyarrow
    import pyarrow.compute

    found: list[set[str]] = []
    file = _open(str(path))
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, columns=list(columns))
        nulls = {name: table[name].is_null().to_pylist() for name in columns}
        for name in columns:
            kind = table.schema.field(name).type
            if pyarrow.types.is_null(kind):
                continue
            if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise ValueError(f"{path}: the column {name} holds no images, but {kind}")
            empty = pyarrow.compute.struct_field(table[name], "bytes").is_null().to_pylist()
            for row, (is_empty, is_null) in enumerate(zip(empty, nulls[name], strict=True), len(found)):
                if is_empty and not is_null:
                    raise ValueError(f"{path}, row {row}: {name} has no bytes of an image")
        found += [{name for name in columns if nulls[name][row]} for row in range(table.num_rows)]
    return found


@lru_cache(maxsize=NUM_CACHED_GROUPS)
def _group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    return _open(path).read_row_group(group, columns=list(columns))


@lru_cache(maxsize=64)
def _open(path: str) -> Any:
    import pyarrow.parquet as parquet  # needed by three benchmarks only

    return parquet.ParquetFile(path)
