from __future__ import annotations

import json
from datetime import datetime

import pytest

from datamodules.importers.reading.field_checks import MOST_NAMES, NUMBER, Schema, format_report

REQUIRED = {"id": int, "name": str}
OPTIONAL = {"area": NUMBER, "novel": object}


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ([], r"f\.json\[3\]: a record of images is an object"),
        ({"id": 1}, r"f\.json\[3\]: field 'name' is missing"),
        ({"id": "1", "name": "a"}, r"field 'id' should be int, found '1'"),
        ({"id": True, "name": "a"}, r"field 'id' should be int, found True"),
        ({"id": 1, "name": "a", "area": "2"}, r"field 'area' should be int/float, found '2'"),
        ({"id": 1, "name": "a", "hue": 7}, r"unknown field 'hue' = 7.*--allow '\[\"hue\"\]'"),
    ],
)
def test_a_surprise_names_place_field_and_value(record: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Schema().check("images", record, "f.json[3]", REQUIRED, OPTIONAL)


def test_keys_and_values_are_counted_and_the_first_record_is_kept() -> None:
    schema = Schema(allow=["hue"])
    schema.check("images", {"id": 1, "name": "a", "hue": 7}, "x", REQUIRED, OPTIONAL)
    schema.check("images", {"id": 2, "name": "b", "area": 2.5, "novel": True}, "x", REQUIRED, OPTIONAL)
    schema.count("type", "gg_train")
    report = schema.report()
    assert report["keys"] == {"images": {"id": 2, "name": 2, "hue": 1, "area": 1, "novel": 1}}
    assert report["first"] == {"images": {"id": 1, "name": "a", "hue": 7}}
    text = format_report(report)
    assert "images: id 2, name 2, hue 1" in text and "type: gg_train 1" in text and '"hue": 7' in text


def test_a_long_report_is_cut() -> None:
    schema = Schema()
    schema.check("record", {"text": "x" * 5000}, "x", {"text": str})
    for number in range(50):
        schema.count("type", f"t{number}")
    text = format_report(schema.report())
    assert len(text) < 1500 and "and 20 more" in text and text.endswith("…")


def test_fields_of_other_tools_are_counted_and_refused_by_none() -> None:
    schema = Schema()
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    odd = {"id": 1, "when": datetime(2026, 5, 1), "data": b"x", "\ud800": "\udfff", "deep": deep}
    schema.tally("row", odd, ("id",))
    schema.tally("other", {"id": 1, "when": datetime(2026, 5, 1), "half": "\udfff"}, ("id",))
    for number in range(MOST_NAMES + 50):
        schema.tally("row", {f"f{number}": 1}, ("id",))
    report = schema.report()
    assert report["keys"]["row"]["(further names)"] > 40 and len(report["keys"]["row"]) == MOST_NAMES + 1
    assert report["counts"]["unknown fields of other, not used"] == {"when": 1, "half": 1}
    assert report["first"] == {
        "row": "no JSON, or nested too deep",
        "other": {"id": 1, "when": "2026-05-01 00:00:00", "half": "?"},
    }
    json.dumps(report, ensure_ascii=False).encode()
