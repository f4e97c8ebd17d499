"""Whatever a record holds, it becomes samples with sound boxes or errors that name it; nothing else is raised."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.importers.own_data import coco
from datamodules.importers.own_data.image_folder import ImageFolder
from datamodules.importers.own_data.records import RecordReader, RecordScan
from datamodules.importers.own_data.statement import COORDINATES, OwnData
from datamodules.importers.reading.field_checks import Schema
from datamodules.importers.reading.source import DataError
from datamodules.samples.boxes import box_fault
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, LoadedSample, SampleError
from tests.datamodules.importers.own_data import own_files
from tests.datamodules.importers.own_data.own_files import LIMITS

# Words that the forms give a meaning, among others.
WORDS = st.sampled_from(
    [
        "<image>",
        "<bbox>",
        "<ref-object>",
        "images/0.jpg",
        "../0.jpg",
        "in the second image",
        "image-1",
        "[1, 2, 30, 40]",
        "(1,2),(30,40)",
        "<|box_start|>(1,2),(3,4)<|box_end|>",
        '{"bbox_2d": [1, 2, 30, 40], "label": "x"}',
        "<think>",
        "</think>",
        "<answer>",
        "\ud800",
        "\0",
        "user",
        "gpt",
        "text",
        "image",
    ]
)
TEXTS = st.lists(WORDS | st.text(max_size=8), max_size=5).map(" ".join)
NUMBERS = st.integers(-5, 1100) | st.floats() | st.sampled_from([10**400, True])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=3)
)
NAMES = ("role", "from", "content", "value", "type", "text", "image", "image_url", "bytes", "path")
TURNS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), max_size=4)
FIELDS: dict[str, st.SearchStrategy] = {
    "messages": TURNS | VALUES,
    "conversations": TURNS | VALUES,
    "prompt": TURNS | VALUES,
    "completion": TURNS | VALUES,
    "images": st.lists(WORDS | VALUES, max_size=3) | VALUES,
    "image": WORDS | VALUES,
    "solution": st.lists(NUMBERS, min_size=4, max_size=4) | VALUES,
    "image_id": VALUES,
    "label": VALUES,
    "id": VALUES,
    "task": VALUES,
    "objects": st.fixed_dictionaries(
        {}, optional={"ref": VALUES, "bbox": st.lists(VALUES, max_size=3) | VALUES, "category": VALUES}
    )
    | VALUES,
}


@st.composite
def changed_records(draw: st.DrawFn) -> dict[str, Any]:
    """A sound record of a form in which a few fields are replaced; sometimes of nothing but such fields."""
    base = draw(BASES)
    names = draw(st.lists(st.sampled_from(sorted(base) * 3 + sorted(FIELDS)), max_size=3 if base else 6, unique=True))
    return base | {name: draw(FIELDS[name]) for name in names}


BASES = st.sampled_from(
    [{}, own_files.swift(0, 0, [8, 8, 24, 24]), *(make(0, 0, [8, 8, 24, 24]) for make in own_files.FORMS.values())]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    root = tmp_path_factory.mktemp("fuzz")
    own_files.write_images(root)
    return ImageFolder(root)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(record=changed_records(), box_format=st.sampled_from([*COORDINATES, None]))
def test_any_record_becomes_samples_or_errors(folder: ImageFolder, record: dict[str, Any], box_format: Any) -> None:
    limits = LIMITS if box_format == "resized_pixels" else None
    reader = RecordReader("jsonl", "fuzz", OwnData(box_format=box_format, resized_limits=limits), folder)
    for made in reader.samples(record, "train:1"):
        if isinstance(made, SampleError):
            assert made.rule and made.sample_id.startswith("fuzz/train:1")
            continue
        assert isinstance(made, LoadedSample)
        answer = made.sample.answer
        boxes = answer.boxes if isinstance(answer, BoxesAnswer) else (answer,)
        assert all(isinstance(box, BoxAnswer) and box_fault(box.box) is None for box in boxes)
    scan = RecordScan(reader, Schema(), Counter(), images_of=lambda images: images)
    scan.look(record, "train:1")
    try:
        scan.finish("train.jsonl")
    except DataError as error:
        assert len(str(error).splitlines()) <= 5


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(st.fixed_dictionaries({"id": LEAVES}, optional={"file_name": VALUES, "width": LEAVES}), max_size=3),
    annotations=st.lists(
        st.fixed_dictionaries(
            {"image_id": st.integers(0, 2) | VALUES, "category_id": st.integers(0, 2) | VALUES},
            optional={"bbox": VALUES, "iscrowd": VALUES, "attributes": VALUES, "ignore": VALUES},
        )
        | VALUES,
        max_size=4,
    ),
    categories=st.lists(st.fixed_dictionaries({"id": LEAVES, "name": VALUES}), max_size=3),
)
def test_any_coco_file_is_imported_or_refused(
    tmp_path: Path, images: list, annotations: list, categories: list
) -> None:
    sound = {"id": 0, "file_name": "images/0.jpg", "width": 64, "height": 48}
    content = {
        "images": [sound, *images],
        "annotations": annotations,
        "categories": [{"id": 0, "name": "kite"}, *categories],
    }
    own_files.write_images(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(content))
    try:
        scan = coco.scan(tmp_path, (), OwnData())
    except DataError:
        return
    for entries in scan.subsets.values():
        for made in scan.convert(entries):
            assert isinstance(made, SampleError | LoadedSample)
