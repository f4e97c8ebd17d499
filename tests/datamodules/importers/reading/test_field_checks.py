from __future__ import annotations

import pytest

from datamodules.importers.reading.field_checks import NUMBER, Schema, format_report

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
