from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.importers.reading import json_stream
from datamodules.importers.reading.json_stream import stream_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def read(path: Path, text: str | bytes) -> list[tuple[str, object]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(item.key, item.value) for item in stream_json(path)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_items_are_those_of_json_wherever_the_window_ends(
    tmp_path, monkeypatch, values, indent, ascii_only, chunk
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "a.json"
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    path.write_bytes(data)
    items = list(stream_json(path))
    assert [item.value for item in items] == values
    assert [json.loads(data[item.start : item.end]) for item in items] == values


def test_an_objects_arrays_come_item_by_item_and_its_other_values_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 3)
    text = ' {"info": {"a": [1]}, "images": [{"é": "ü"}, 12 , 3.5e2], "none": [], "last": "x"} \n'
    found = read(tmp_path / "a.json", text)
    assert found == [("info", {"a": [1]}), ("images", {"é": "ü"}), ("images", 12), ("images", 350.0), ("last", "x")]
    assert read(tmp_path / "a.json", "{}") == read(tmp_path / "a.json", "[ ]") == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "byte 0: expected a list or an object"),
        (b'"text"', "expected a list or an object"),
        (b"[1, 2", "byte 5: expected a comma or ]"),
        (b"[1, ]", "byte 4: expected a JSON value"),
        (b"[1 2]", "expected a comma"),
        (b'[{"a": 1}] more', "byte 11: expected the end"),
        (b'{"a" 1}', "a key and a colon"),
        (b"{1: 2}", "a key and a colon"),
        (b'{"a": {"b": 1}', "expected a comma or }"),
        (b'["\xff"]', "byte 1: not UTF-8"),
        (b"[" + b"[" * 100_000, "less depth|JSON value"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, text: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.json.*({fault})"):
        read(tmp_path / "a.json", text)


def test_a_broken_item_is_not_searched_for_its_end_through_the_whole_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 16)
    monkeypatch.setattr(json_stream, "MAX_ITEM", 64)
    path = tmp_path / "a.json"
    path.write_text('["' + "x" * 100_000)
    with path.open("rb") as file:
        stream = json_stream._Stream(file, path)
        with pytest.raises(ValueError, match="byte 1: expected a JSON value"):
            list(stream.items())
        assert file.tell() < 1000


def test_a_missing_comma_is_not_searched_for_through_the_whole_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 16)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}{"a": 2}' + ', {"a": 3}' * 10_000 + "]")
    with path.open("rb") as file:
        stream = json_stream._Stream(file, path)
        with pytest.raises(ValueError, match="byte 9: expected a comma"):
            list(stream.items())
        assert file.tell() < 1000
