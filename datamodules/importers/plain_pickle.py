"""Load pickles with plain values only. RefCOCO's references are a pickle, and unpickling can otherwise run any code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn


class _PlainUnpickler(pickle.Unpickler):
    """Loads lists, dicts, tuples, sets, strings, bytes, numbers, None; refuses classes and functions. No code runs."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to a persistent object {pid!r:.100}")


def load_plain_pickle(path: str | Path) -> Any:
    """The value in the file. Byte strings of Python 2 become str. Raises ValueError for other than plain values."""
    data = Path(path).read_bytes()
    try:
        try:
            # `encoding` is only for byte strings that Python 2 wrote; texts of Python 3 are always UTF-8.
            return _PlainUnpickler(io.BytesIO(data), encoding="ASCII").load()
        except UnicodeDecodeError:  # Python 2 wrote strings without an encoding
            return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # a damaged pickle may raise any exception
        raise ValueError(f"{path} is not a pickle of plain values: {error}") from error
