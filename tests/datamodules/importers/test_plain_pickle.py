from __future__ import annotations

import collections
import datetime
import os
import pickle
from pathlib import Path

import pytest

from datamodules.importers.plain_pickle import load_plain_pickle

VALUE = [{"ref_id": 1, "sentences": [{"raw": "a café", "tokens": ("a", b"b"), "score": 0.5}], "none": None, "ok": True}]


class Runs:
    """Unpickled by pickle, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def load(path: Path, data: bytes) -> object:
    path.write_bytes(data)
    return load_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read(tmp_path: Path, protocol: int) -> None:
    value = VALUE if protocol > 2 else [{"sent": "the café", "ids": [1, 2]}]  # protocols below 3 need a call for bytes
    assert load(tmp_path / "a.p", pickle.dumps(value, protocol)) == value


def test_byte_strings_of_python_2_become_text(tmp_path: Path) -> None:
    # What Python 2 writes for ['abc', 'caf\xe9'] with protocols 0 and 2.
    for data in (b"(lp0\nS'abc'\np1\naS'caf\\xe9'\np2\na.", b"\x80\x02]q\x00(U\x03abcq\x01U\x04caf\xe9q\x02e."):
        assert load(tmp_path / "a.p", data) == ["abc", "café"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps([Runs(tmp_path / "made")], protocol)
    with pytest.raises(ValueError, match=r"a\.p is not a pickle of plain values: it names (posix|nt)\.mkdir"):
        load(tmp_path / "a.p", data)
    assert not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").is_dir(), "it would have run"


@pytest.mark.parametrize(
    "data",
    [
        b"(S'echo'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'echo'\no.",  # OBJ
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"Psome-id\n.",  # a persistent object
        pickle.dumps(collections.OrderedDict(a=1)),
        pickle.dumps(datetime.date(2020, 1, 1)),
        pickle.dumps(len),
        pickle.dumps(VALUE)[:-9],
        b"",
        b"not a pickle",
        b"\x80\x04]\x94R.",
        b"\x80\x02]}b.",  # BUILD on a list
    ],
)
def test_anything_but_plain_values_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match="is not a pickle of plain values"):
        load(tmp_path / "a.p", data)
