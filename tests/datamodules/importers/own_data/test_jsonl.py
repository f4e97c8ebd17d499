"""JSON lines in the published forms: what they become, and what is refused, counted or passed over."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.importers.own_data import jsonl, records
from datamodules.importers.own_data.statement import COORDINATES, Coordinates, OwnData
from datamodules.importers.reading.source import DataError, Scan
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, BoxPart, LoadedSample, SampleError, TextPart
from tests.datamodules.importers.own_data import own_files
from tests.datamodules.importers.own_data.own_files import FORMS, LIMITS, SIZES, numbers, true_boxes, write_jsonl
from tests.datamodules.importers.published import jpeg

PIXELS = OwnData(box_format="pixels")


def outcomes(scan: Scan, subset: str = "train") -> list[LoadedSample | SampleError]:
    return list(scan.convert(scan.subsets[subset]))


def imported(root: Path, own: OwnData = PIXELS, subset: str = "train") -> list[LoadedSample]:
    found = outcomes(jsonl.scan(root, (), own), subset)
    assert all(isinstance(one, LoadedSample) for one in found), found
    return found


def rules(root: Path, own: OwnData = PIXELS) -> Counter[str]:
    return Counter(one.rule for one in outcomes(jsonl.scan(root, (), own)) if isinstance(one, SampleError))


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_to_its_boxes_in_every_box_format(
    tmp_path: Path, form: str, coordinates: Coordinates
) -> None:
    lines = own_files.records(form, coordinates)
    own = OwnData(box_format=coordinates, resized_limits=LIMITS if coordinates == "resized_pixels" else None)
    samples = imported(write_jsonl(tmp_path, lines), own)
    turns = 2 if form == "sharegpt" else 1
    expected = [true for true in true_boxes() for _ in range(turns)]
    assert len(samples) == len(expected)
    for loaded, (image, box) in zip(samples, expected, strict=True):
        answer = loaded.sample.answer
        assert isinstance(answer, BoxAnswer) and answer.image == image
        assert answer.label == ("" if loaded.sample.messages[-1] == TextPart("And its tail?") else "kite")
        assert answer.box == pytest.approx(box, abs=1e-9)
        assert loaded.images == (jpeg(0, SIZES[0]), jpeg(1, SIZES[1]))
        assert [part.image for part in loaded.sample.messages[:2]] == [0, 1]


def test_the_four_forms_of_a_record_keep_what_they_say(tmp_path: Path) -> None:
    lines = [own_files.records(form, count=1)[0] for form in ("qwen", "sharegpt", "trl")]
    first, second, third, fourth = (loaded.sample for loaded in imported(write_jsonl(tmp_path, lines)))
    name = tmp_path.name
    assert (first.id, second.id, third.id, fourth.id) == (
        f"{name}/train:1",
        f"{name}/train:2/0",
        f"{name}/train:2/1",
        f"{name}/train:3",
    )
    assert first.extra == {"image_from": "answer", "form": "messages", "record": "q0"}
    assert first.messages[2] == TextPart("Which kite is in one picture alone?") and first.thinking is None
    assert second.thinking == "Only one shows it." and second.extra["record"] == 0
    assert third.messages[2] == TextPart("And its tail?") and third.thinking is None
    assert fourth.extra["image_from"] == "record" and fourth.images == ("images/0.jpg", "images/1.jpg")
    assert {sample.task for sample in (first, second, third, fourth)} == {name} and first.source == "jsonl"


@pytest.mark.parametrize(("kind", "coordinates"), [(None, "pixels"), ("real", "pixels"), ("norm1", "normalized")])
def test_ms_swift_says_itself_what_its_boxes_are(tmp_path: Path, kind: str | None, coordinates: Coordinates) -> None:
    lines = [
        own_files.swift(number, image, numbers(box, SIZES[image], coordinates), kind)
        for number, (image, box) in enumerate(true_boxes())
    ]
    for loaded, (image, box) in zip(imported(write_jsonl(tmp_path, lines), OwnData()), true_boxes(), strict=True):
        assert loaded.sample.answer == BoxAnswer(image, box, "its tail")
        asked = [part for part in loaded.sample.messages if isinstance(part, BoxPart)]
        assert [(part.image, part.box) for part in asked] == [(image, (0.0, 0.0, *box[2:]))]
        text = [part.text for part in loaded.sample.messages if isinstance(part, TextPart)]
        assert text == ["Beside ", " there is a kite. Find it."]
        assert loaded.sample.extra["image_from"] == "record"


def test_ms_swifts_default_image_is_the_first_one_unless_the_text_contradicts_it(tmp_path: Path) -> None:
    plain, other, single = (own_files.swift(0, 0, [0, 0, 32, 24]) for _ in range(3))
    for record in (plain, other, single):
        del record["objects"]["image_id"]
    other["messages"][2]["content"] = "In the second image: <ref-object><bbox>"
    unnormed = own_files.swift(0, 0, [0, 0, 0.5, 0.5], "norm1")  # the default is documented for "real" alone
    del unnormed["objects"]["image_id"]
    found = outcomes(jsonl.scan(write_jsonl(tmp_path, [plain, other, unnormed]), (), OwnData()))
    assert found[0].sample.answer.image == 0 and found[0].sample.extra["image_from"] == "form"
    assert [one.rule for one in found[1:]] == ["image_conflict", "image_unknown"]


def test_what_a_record_says_of_its_boxes_is_not_overruled(tmp_path: Path) -> None:
    lines = [own_files.swift(0, 0, [0, 0, 32, 24], "real"), own_files.swift(1, 0, [0, 0, 32, 24])]
    found = outcomes(jsonl.scan(write_jsonl(tmp_path, lines), (), OwnData(box_format="relative_1000")))
    assert found[0].rule == "box_format_conflict"
    assert found[1].sample.answer.box == (0.0, 0.0, 0.032, 0.024), "a default of the form is overruled"


def swift_with(**objects: Any) -> dict[str, Any]:
    record = own_files.swift(0, 0, [0, 0, 32, 24])
    record["objects"] |= objects
    return record


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (swift_with(bbox=[[0, 0, 8, 8]]), "bbox_count"),
        (swift_with(ref=["kite"]), "ref_count"),
        (swift_with(ref=["<bbox>", "x"]), "ref_count"),
        (swift_with(ref=["kite", 3]), "field_type"),
        (swift_with(bbox=[[0, 0, 8, 8], [6, 2]]), "box_length"),
        (swift_with(bbox=[[0, 0, 8, 8], [0, 0, "8", 8]]), "field_type"),
        (swift_with(bbox_type="norm1000"), "bbox_type"),
        (swift_with(image_id=[0]), "image_id"),
        (swift_with(image_id=[0, 2]), "image_id"),
        (swift_with(image_id=[0, "1"]), "image_id"),
        (swift_with(image_id=[0, True]), "image_id"),
        (own_files.swift(0, 0, [0, 0, 32, 24]) | {"objects": "[]"}, "field_type"),
    ],
)
def test_tags_that_do_not_fit_their_objects_are_named(tmp_path: Path, record: dict, rule: str) -> None:
    good = own_files.swift(1, 0, [0, 0, 32, 24])
    assert rules(write_jsonl(tmp_path, [record, good]), OwnData()) == {rule: 1}


def test_ms_swifts_new_json_form_has_its_labels_as_plain_texts(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>Find the <ref-object>."},
            {"role": "assistant", "content": '[{"bbox_2d": <bbox>, "label": "<ref-object>"}]'},
        ],
        "images": ["images/0.jpg"],
        "objects": {"ref": ["kite", 'the "red" kite'], "bbox": [[8, 12, 16.5, 24]]},
    }
    (loaded,) = imported(write_jsonl(tmp_path, [record]), OwnData())
    assert loaded.sample.answer == BoxAnswer(0, (8 / 64, 12 / 48, 16.5 / 64, 24 / 48), 'the "red" kite')


QWEN = own_files.qwen(0, 0, [0, 0, 32, 24])


def answered(text: Any, question: str = "<image><image>Where?", **fields: Any) -> dict[str, Any]:
    """A record of two images with this answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"messages": turns, "images": ["images/0.jpg", "images/1.jpg"], **fields}


@pytest.mark.parametrize(
    ("record", "image"),
    [
        (answered("In the second image: [0, 0, 8, 8]"), 1),
        (answered("Image-1 shows it: (0, 0), (8, 8)"), 0),
        (answered("[0, 0, 8, 8]", image_id=1), 1),
        (answered("[0, 0, 8, 8]", image_id=[0]), 0),
        (answered("It is in the 2nd image: [0, 0, 8, 8]", image_id=1), 1),
        (answered("The first and the second image show kites; the red one is in the second image: [0, 0, 8, 8]"), 1),
    ],
)
def test_the_image_of_a_box_is_the_one_that_the_record_or_the_answer_names(tmp_path: Path, record, image: int) -> None:
    (loaded,) = imported(write_jsonl(tmp_path, [record]))
    assert loaded.sample.answer.image == image


# As the project's own models write several boxes: images count from 1.
KEYED = '[{"image": 1, "bbox_2d": [0, 0, 8, 8]}, {"image": 2, "bbox_2d": [1, 1, 2, 2]}]'


@pytest.mark.parametrize("text", [KEYED, KEYED.replace("1,", "0,", 1).replace("2,", "1,", 1)])
def test_numbers_beside_boxes_may_repeat_what_the_record_says(tmp_path: Path, text: str) -> None:
    (loaded,) = imported(write_jsonl(tmp_path, [answered(text, image_id=[0, 1])]))
    assert [box.image for box in loaded.sample.answer.boxes] == [0, 1]


def test_several_boxes_are_each_in_the_image_named_before_them(tmp_path: Path) -> None:
    record = answered("In the first image: [0, 0, 8, 8]; in the second image: [0, 0, 4, 8] and [4, 4, 8, 8].")
    twice = answered("[[0, 0, 8, 8], [0, 0, 4, 8]]", image_id=[1, 0])
    first, second = imported(write_jsonl(tmp_path, [record, twice]))
    assert isinstance(first.sample.answer, BoxesAnswer)
    assert [box.image for box in first.sample.answer.boxes] == [0, 1, 1]
    assert [box.image for box in second.sample.answer.boxes] == [1, 0]


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (answered("[0, 0, 8, 8]"), "image_unknown"),
        (answered("[0, 0, 8, 8]", "<image><image>Find the thing of the first image in the other."), "image_unknown"),
        (answered("In the first image or in the second image: [0, 0, 8, 8]"), "image_unknown"),
        (answered("In the first and the second image: [0, 0, 8, 8], [1, 1, 2, 2]"), "image_unknown"),
        (answered("In image 1 and image 2: [0, 0, 8, 8], [1, 1, 2, 2]"), "image_unknown"),
        (answered("In the first image, the second image: [0, 0, 8, 8], [1, 1, 2, 2]"), "image_unknown"),
        (answered("In the second image: [0, 0, 8, 8]", image_id=0), "image_conflict"),
        (answered("As in image 2, [0, 0, 8, 8] in image 1 and [1, 1, 2, 2] in image 2"), "image_unknown"),
        (answered(f"The second image has most: {KEYED}"), "image_conflict"),
        (answered(KEYED, image_id=[1, 0]), "image_conflict"),
        (answered(KEYED, image_id=1), "image_conflict"),
        (answered(KEYED), "image_unknown"),
        (answered("In the third image: [0, 0, 8, 8]"), "image_index"),
        (answered("[0, 0, 8, 8]", image_id=2), "image_id"),
        (answered("[0, 0, 8, 8]", image_id=[0, 1]), "image_id"),
        (answered("[0, 0, 8, 8]", image_id="0"), "image_id"),
        (answered('In image 1: [0, 0, 8, 8] {"bbox_2d": [1, 1, 2, 2]}'), "mixed_boxes"),
        (answered("In image 1: [0, 0, 8, 8] and [1, 2, 3]"), "unreadable_box"),
        (answered("In image 1: [0, 0, 8, 8] and [1, 2, 3, 4, 5]"), "unreadable_box"),
        (answered("In image 1: [0, 0, 8, 8]" + ", [0, 0, 8, 8]" * 600), "answer_too_long"),
        (answered("<think>no end [0, 0, 8, 8]"), "no_box"),
        (answered("In image 1: [0, 0, 8, 8]", "<image>Where?"), "image_tags"),
        (answered("In image 1: [0, 0, 8, 8]", "<image><image><image>Where?"), "image_tags"),
        (answered("<image> In image 1: [0, 0, 8, 8]"), "image_tags"),
        (answered("In image 1: [0, 0, 8, 8]", "<image><image>"), "no_question"),
        (answered("In image 1: [0, 0, 8, 8]", "<image><image><|image_pad|>?"), "reserved_token"),
        (answered("In image 1: [0, 0, 8, 8]", images=[]), "image_tags"),
        (answered("In image 1: [0, 0, 8, 8]", "Where?", images=[]), "no_images"),
        (answered("In image 1: [0, 0, 8, 8]", images=["images/0.jpg", "images/9.jpg"]), "missing_image"),
        (answered("In image 1: [0, 0, 8, 8]", images=["images/0.jpg", 7]), "field_type"),
        (answered("In image 1: [0, 0, 8, 8]", image="images/0.jpg"), "field_type"),
        (answered("In image 1: [60, 0, 99, 8]"), "out_of_range_box"),
        (answered("In image 1: [8, 0, 2, 8]"), "degenerate_box"),
        (answered("In image 1: [1e999, 0, 2, 8]"), "unreadable_box"),
        (answered("x", messages=QWEN["messages"][:2], solution=[0, 0, 10**400, 8]), "unreadable_box"),
        (answered("x", messages=None, prompt=False, completion=[]), "field_type"),
        (answered(None), "turn_order"),
        (answered("x", messages=[]), "turn_order"),
        (answered("x", messages="hello"), "field_type"),
        (answered("x", messages=[{"role": "user", "content": "<image><image>Where?"}]), "no_answer"),
        (answered("x", messages=[{"role": "tool", "content": "a"}]), "turn_order"),
        (answered("x", messages=[{"role": "user", "content": [{"type": "video"}]}]), "field_type"),
        (answered("x", prompt="Where?"), "unknown_form"),
        ({"text": "no conversation"}, "unknown_form"),
        (answered("In image 1: [0, 0, 8, 8]", task="\ud800"), "not_unicode"),
    ],
)
def test_every_fault_of_a_record_has_a_rule_and_a_place(tmp_path: Path, record: dict[str, Any], rule: str) -> None:
    write_jsonl(tmp_path, [QWEN])
    (tmp_path / "train.jsonl").write_text(json.dumps(record | {"id": "mine"}) + "\n" + json.dumps(QWEN) + "\n")
    scan = jsonl.scan(tmp_path, (), PIXELS)
    if rule == "no_box":
        assert scan.skipped == {"no_box": 1} and len(scan.subsets["train"]) == 1
        return
    error, sound = outcomes(scan)
    assert error.rule == rule and error.sample_id == f"{tmp_path.name}/train:1"
    assert "record 'mine': " in error.detail
    assert isinstance(sound, LoadedSample)


def test_the_question_says_the_image_only_where_the_user_says_so(tmp_path: Path) -> None:
    record = answered("[0, 0, 8, 8]", "<image><image>Locate the kite in the second image.")
    root = write_jsonl(tmp_path, [record])
    assert rules(root) == {"image_unknown": 1}
    (loaded,) = imported(root, OwnData(box_format="pixels", image_in_question=True))
    assert loaded.sample.answer.image == 1 and loaded.sample.extra["image_from"] == "question"
    listed = answered("[0, 0, 8, 8]", "<image><image>Locate the kite in the first and the second image.")
    root = write_jsonl(tmp_path / "listed", [listed])
    assert rules(root, OwnData(box_format="pixels", image_in_question=True)) == {"image_unknown": 1}


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("In the second image, what is at [8, 8, 16, 24]?", ["In the second image, what is at ", (1, 8, 16), "?"]),
        (
            "The first image has <|box_start|>(8,8),(16,24)<|box_end|>. Find it.",
            ["The first image has ", (0, 8, 16), ". Find it."],
        ),
        ("Image 1: (8, 8), (16, 24)", ["Image 1: ", (0, 8, 16)]),
        ("Choose from [1, 2, 3] and {a}.", ["Choose from [1, 2, 3] and {a}."]),
    ],
)
def test_boxes_of_a_question_are_boxes_too(tmp_path: Path, question: str, parts: list) -> None:
    record = answered("In image 1: [0, 0, 8, 8]", f"<image><image>{question}")
    (loaded,) = imported(write_jsonl(tmp_path, [record]))
    found = [
        part.text if isinstance(part, TextPart) else (part.image, part.box[0], part.box[2])
        for part in loaded.sample.messages[2:]
    ]
    wide = {0: 64, 1: 40}
    expected = [p if isinstance(p, str) else (p[0], p[1] / wide[p[0]], p[2] / wide[p[0]]) for p in parts]
    assert found == expected


@pytest.mark.parametrize(
    ("question", "rule"),
    [
        ("What is at [8, 8, 16, 24]?", "image_unknown"),
        ('Image 1: {"bbox_2d": [8, 8, 16, 24]}', "question_box"),
        ("Image 1: [[8, 8, 16, 24], [1, 1, 2, 2]]", "question_box"),
        ('Image 1: {"at": [8, 8, 16, 24]}', "question_box"),
        ("Image 1: [8, 8, 160, 24]", "out_of_range_box"),
    ],
)
def test_a_box_of_a_question_that_cannot_be_placed_is_named(tmp_path: Path, question: str, rule: str) -> None:
    good = [answered("In image 1: [0, 0, 8, 8]") for _ in range(40)]
    record = answered("In image 1: [0, 0, 8, 8]", f"<image><image>{question}")
    assert rules(write_jsonl(tmp_path, [record, *good])) == {rule: 1}


def test_images_come_first_where_nothing_says_their_places(tmp_path: Path) -> None:
    (loaded,) = imported(write_jsonl(tmp_path, [answered("In image 2: [0, 0, 8, 8]", "Where?")]))
    assert [type(part).__name__ for part in loaded.sample.messages] == ["ImagePart", "ImagePart", "TextPart"]


def test_fields_of_other_names_are_read_where_the_user_names_them(tmp_path: Path) -> None:
    # The columns of many data sets for rewards: problem, solution, image.
    record = {"uid": "v1", "problem": "Where is the kite?", "solution": [0, 0, 32, 24], "picture": "images/0.jpg"}
    fields = {"prompt": "problem", "image": "picture", "id": "uid"}
    (loaded,) = imported(write_jsonl(tmp_path, [record]), OwnData(box_format="pixels", fields=fields, task="kites"))
    assert loaded.sample.answer == BoxAnswer(0, (0.0, 0.0, 0.5, 0.5), "")
    assert loaded.sample.task == "kites" and loaded.sample.extra["record"] == "v1"


@pytest.mark.parametrize("solution", [[[0, 0, 32, 24]], {"bbox_2d": [0, 0, 32, 24]}, "<answer>[0, 0, 32, 24]</answer>"])
def test_a_solution_is_numbers_or_a_text_with_them(tmp_path: Path, solution: Any) -> None:
    record = {"prompt": "Where is the kite?", "solution": solution, "images": ["images/0.jpg"]}
    (loaded,) = imported(write_jsonl(tmp_path, [record]))
    assert loaded.sample.answer.box == (0.0, 0.0, 0.5, 0.5)


def test_a_record_without_a_conversation_asks_for_each_of_its_categories(tmp_path: Path) -> None:
    # metadata.jsonl of the library datasets' ImageFolder.
    record = {"file_name": "0.jpg", "objects": {"bbox": [[0, 0, 32, 24], [8, 8, 8, 8], [1, 1, 8, 8]]}}
    record["objects"]["categories"] = ["kite", 1, "kite"]
    own = OwnData(box_format="pixels_xywh", categories=["tail", "bird"], images=str(tmp_path / "images"))
    several, single = imported(write_jsonl(tmp_path, [record]), own)
    assert several.sample.answer.boxes[0].box == (0.0, 0.0, 0.5, 0.5)
    assert single.sample.answer == BoxAnswer(0, (8 / 64, 8 / 48, 16 / 64, 16 / 48), "bird")
    asked = OwnData(**{**vars(own), "questions": ["Show me: {}!"]})
    assert [one.sample.messages[1].text for one in imported(tmp_path, asked)] == ["Show me: kite!", "Show me: bird!"]
    assert rules(tmp_path, OwnData(box_format="pixels_xywh", images=own.images)) == {"category_name": 1}


def test_text_answers_are_counted_apart_and_not_rejected(tmp_path: Path) -> None:
    lines = [QWEN, answered("A kite."), own_files.sharegpt(1, 0, [0, 0, 8, 8])]
    lines[2]["conversations"][3]["value"] = "It has none."
    scan = jsonl.scan(write_jsonl(tmp_path, lines), (), PIXELS)
    assert scan.skipped == {"no_box": 1}
    assert [one.rule for one in outcomes(scan) if isinstance(one, SampleError)] == ["no_box"], "a turn of a talk"


def test_a_label_that_is_no_text_is_another_field_and_system_prompts_are_counted(tmp_path: Path) -> None:
    record = answered("In image 1: [0, 0, 8, 8]", label=True, system="Be kind.")
    scan = jsonl.scan(write_jsonl(tmp_path, [record]), (), PIXELS)
    (loaded,) = outcomes(scan)
    assert loaded.sample.answer.label == ""
    assert sum(scan.report["counts"]["system prompts"].values()) == 1


def test_unknown_fields_are_counted_and_shown(tmp_path: Path) -> None:
    scan = jsonl.scan(write_jsonl(tmp_path, [QWEN | {"score": 0.5}, QWEN | {"score": 1, "meta": {}}]), (), PIXELS)
    assert scan.report["counts"]["unknown fields of messages record, not used"] == {"score": 2, "meta": 1}
    assert scan.report["counts"]["forms"] == {"messages": 2}


def lines_of(root: Path, data: bytes) -> Counter[str]:
    write_jsonl(root, [])
    (root / "train.jsonl").write_bytes(data)
    found = outcomes(jsonl.scan(root, (), PIXELS))
    counts = Counter(one.rule for one in found if isinstance(one, SampleError))
    return counts | Counter({"sound": sum(isinstance(one, LoadedSample) for one in found)})


GOOD = json.dumps(QWEN).encode()


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        (b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD, {"sound": 2}),  # a byte order mark, CRLF, blank lines
        (GOOD + b"\n" + GOOD[:-30], {"sound": 1, "bad_json": 1}),  # half a line at the end
        (GOOD[:-30] + b"\n" + GOOD + b"\n", {"sound": 1, "bad_json": 1}),  # and in the middle
        (GOOD + b"\n" + GOOD.replace(b'"id": "q0"', b'"id": NaN'), {"sound": 1, "bad_json": 1}),
        (GOOD + b"\n" + GOOD.replace(b'"id": "q0"', b'"id": "a", "id": "b"'), {"sound": 1, "bad_json": 1}),
        (GOOD + b"\n" + GOOD.replace(b'"q0"', b"1" * 5000), {"sound": 1, "bad_json": 1}),
        (GOOD + b"\n" + GOOD.replace(b'"q0"', b"[" * 100_000 + b"]" * 100_000), {"sound": 1, "bad_json": 1}),
        (GOOD + b"\n" + GOOD.replace(b"kite", b"k\xffte"), {"sound": 1, "not_utf8": 1}),
        (GOOD + b"\n[1, 2]\n3\nnull\n", {"sound": 1, "field_type": 3}),
        (b"[" + GOOD + b",\n" + GOOD + b"]", {"sound": 2}),  # a list, as LLaVA publishes its records
        (b"\xef\xbb\xbf[" + GOOD + b"]", {"sound": 1}),
    ],
)
def test_a_broken_line_costs_that_line_alone(tmp_path: Path, data: bytes, counts: dict[str, int]) -> None:
    assert lines_of(tmp_path, data) == counts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD.decode().encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"[" + GOOD + b", " + GOOD[:-9], "the list is not whole"),
        (b"", "no record has an answer with a box"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lines_of(tmp_path, data)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_ITEM", 1000)
    with pytest.raises(DataError, match=r"byte 0: a line of more than 1,000 bytes"):
        lines_of(tmp_path, b"x" * 5000)


def test_files_are_found_by_what_they_hold_and_are_subsets(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [QWEN])
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "val.json").write_text(json.dumps([QWEN, QWEN]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "train.jsonl"}}))
    (tmp_path / ".hidden.jsonl").write_text("x")
    scan = jsonl.scan(tmp_path, (), PIXELS)
    assert {name: len(entries) for name, entries in scan.subsets.items()} == {"train": 1, "part/val": 2}
    assert len(imported(tmp_path, PIXELS, "part/val")) == 2
    assert len(imported(tmp_path / "train.jsonl", PIXELS)) == 1
    with pytest.raises(DataError, match=r"no \.jsonl file"):
        jsonl.scan(tmp_path / "images", (), PIXELS)


def test_two_files_of_one_name_do_not_hide_each_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [QWEN])
    (tmp_path / "train.json").write_text(json.dumps([QWEN, QWEN]))
    with pytest.raises(DataError, match=r"train\.json and .*train\.jsonl would both be the subset 'train': rename"):
        jsonl.scan(tmp_path, (), PIXELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda box: [value / 100 for value in box], r"100% of 10 boxes cannot be pixels.*\n.*\n.*\n.*\n  normalized"),
        (lambda box: [value * 30 for value in box], r"cannot be pixels"),
        (lambda box: [box[2], box[1], box[0], box[3]], r"cannot be pixels"),
    ],
)
def test_a_file_whose_boxes_contradict_the_statement_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    boxes = [[float(k), 4.0, 20.0 + k, 30.0] for k in range(10)]
    lines = [answered(f"In image 1: {json.dumps(change(box))}") for box in boxes]
    with pytest.raises(DataError, match=message) as caught:
        jsonl.scan(write_jsonl(tmp_path, lines), (), PIXELS)
    assert str(caught.value).startswith("train.jsonl:") and len(str(caught.value).splitlines()) == 5


def test_without_a_statement_the_import_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing says what the numbers of a box mean(?s:.*)pixels 100%"):
        jsonl.scan(write_jsonl(tmp_path, [QWEN]), (), OwnData())


def test_a_record_that_the_check_did_not_see_is_rejected_and_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CHECKED", 5)
    lines = [own_files.swift(k, 0, [0, 0, 32, 24]) for k in range(400)]
    lines[200] = QWEN  # says nothing; not among the five by this seed
    assert rules(write_jsonl(tmp_path, lines), OwnData()) == {"box_format_unknown": 1}


def test_the_scan_keeps_a_bounded_number_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHECKED", 7)
    drawn: records.Reservoir[int] = records.Reservoir()
    for number in range(1000):
        drawn.add(number)
    assert len(drawn.kept) == 7 and len(set(drawn.kept)) == 7
    assert max(drawn.kept) > 100, "not only the first ones"
