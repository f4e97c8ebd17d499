"""Typed samples: round trips, every rule that rejects a record, and the counting of rejections."""

from __future__ import annotations

import copy
import json
import math
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.samples.sample import (
    BoxAnswer,
    BoxesAnswer,
    BoxPart,
    ChoiceAnswer,
    ImagePart,
    Sample,
    SampleError,
    TextPart,
)

BOX = (0.1, 0.2, 0.5, 0.6)
SAMPLE = Sample(
    id="nano/7",
    source="nano",
    task="multi_view",
    images=("a.png", "b.jpg"),
    messages=(
        ImagePart(0),
        ImagePart(1),
        TextPart("The object at "),
        BoxPart(0, (0.139, 0.305, 0.495, 0.743), "<|box_start|>(139,305),(495,743)<|box_end|>"),
        TextPart(" in image 2?"),
    ),
    answer=BoxAnswer(1, BOX, "red circle"),
    thinking="Same shape, so it is the circle.",
    extra={"seed": 3},
)
DATA = runpy.run_path(str(Path(__file__).with_name("broken_records.py")))
BROKEN, DELETE = DATA["BROKEN"], DATA["DELETE"]


def changed(path: str, value: Any) -> dict[str, Any]:
    """SAMPLE's record with the dotted `path` set to `value`, or deleted."""
    record = copy.deepcopy(SAMPLE.to_json())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target = record
    for key in parents:
        target = target[key]
    if value is DELETE:
        del target[last]
    else:
        target[last] = value
    return record


ANSWERS = [
    BoxAnswer(0, (0.0, 0.0, 1.0, 1.0), ""),
    BoxesAnswer((BoxAnswer(0, BOX, "a"), BoxAnswer(1, BOX, "b"))),
    ChoiceAnswer("B", ("left", "right")),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=["box", "boxes", "choice"])
@pytest.mark.parametrize("thinking", [None, "because"])
def test_a_sample_returns_from_json_text(answer, thinking) -> None:
    fields = {**SAMPLE.__dict__, "answer": answer, "thinking": thinking}
    sample = Sample(**fields)
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)


@given(names, names, st.lists(names, min_size=1, max_size=5), names.filter(str.strip), st.data())
def test_any_valid_sample_returns_from_json_text(sample_id, task, images, question, data) -> None:
    index = data.draw(st.integers(0, len(images) - 1))
    x1, y1 = data.draw(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)))
    x2, y2 = data.draw(st.tuples(st.floats(0.51, 1), st.floats(0.51, 1)))
    sample = Sample(
        id=sample_id,
        source="s",
        task=task,
        images=tuple(images),
        messages=(*(ImagePart(k) for k in range(len(images))), TextPart(question)),
        answer=BoxAnswer(index, (x1, y1, x2, y2), task),
    )
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


def test_the_json_form_is_the_documented_one() -> None:
    record = SAMPLE.to_json()
    assert record["messages"][0] == {"type": "image", "image": 0}
    assert record["messages"][2] == {"type": "text", "text": "The object at "}
    assert record["messages"][3]["box"] == [0.139, 0.305, 0.495, 0.743]
    assert record["answer"] == {"image": 1, "box": [0.1, 0.2, 0.5, 0.6], "label": "red circle"}


def test_thinking_and_extra_may_be_absent() -> None:
    record = changed("thinking", DELETE)
    del record["extra"]
    sample = Sample.from_json(record)
    assert sample.thinking is None and sample.extra == {}


def test_samples_are_frozen_hashable_and_do_not_share_the_records_objects() -> None:
    record = SAMPLE.to_json()
    sample = Sample.from_json(record)
    record["images"].append("c.png")
    record["extra"]["seed"] = 4
    assert sample == SAMPLE and hash(sample) == hash(SAMPLE)
    with pytest.raises(AttributeError):
        sample.id = "other"


@pytest.mark.parametrize(
    ("path", "value", "rule"), BROKEN, ids=[f"{i}-{case[0]}-{case[2]}" for i, case in enumerate(BROKEN)]
)
def test_a_broken_record_is_rejected_with_its_id_and_rule(path: str, value: Any, rule: str) -> None:
    with pytest.raises(SampleError) as caught:
        Sample.from_json(changed(path, value))
    assert caught.value.rule == rule
    assert caught.value.sample_id == ("unknown" if path == "id" else "nano/7")
    assert rule in str(caught.value) and caught.value.sample_id in str(caught.value)


@pytest.mark.parametrize("record", [None, [], "text", 5, [SAMPLE.to_json()]])
def test_what_is_no_object_is_rejected(record) -> None:
    with pytest.raises(SampleError, match="field_type"):
        Sample.from_json(record)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PATHS = ["id", "images", "images.0", "messages", "messages.0", "messages.2.text", "messages.3.box", "messages.3.box.1"]
PATHS += ["answer", "answer.image", "answer.box", "answer.box.2", "answer.label", "thinking", "extra", "new"]


@given(st.sampled_from(PATHS), json_values, st.booleans())
def test_any_replacement_is_accepted_or_rejected_by_rule(path: str, value: Any, strict_boxes: bool) -> None:
    try:
        sample = Sample.from_json(changed(path, value), strict_boxes)
    except SampleError as error:
        assert error.rule
    else:
        assert Sample.from_json(sample.to_json(), strict_boxes).to_json() == sample.to_json()


@pytest.mark.parametrize("box", [[0.027, 0.18, 0.143, 0.051], [0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 1.048, 0.5]])
def test_lenient_boxes_let_a_benchmarks_answers_pass_as_they_are(box) -> None:
    assert Sample.from_json(changed("answer.box", box), strict_boxes=False).answer.box == tuple(box)
    with pytest.raises(SampleError):
        Sample.from_json(changed("answer.box", box))


def test_lenient_boxes_still_refuse_non_finite_numbers_and_bad_boxes_in_the_question() -> None:
    with pytest.raises(SampleError, match="not_finite_box"):
        Sample.from_json(changed("answer.box", [0, 0, math.nan, 1]), strict_boxes=False)
    with pytest.raises(SampleError, match="degenerate_box"):
        Sample.from_json(changed("messages.3.box", [0.5, 0.5, 0.5, 0.5]), strict_boxes=False)


def test_a_sample_error_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SampleError("nano/7", "degenerate_box", "x2 <= x1")))
    assert (error.sample_id, error.rule) == ("nano/7", "degenerate_box")
    assert str(error) == "sample 'nano/7': degenerate_box: x2 <= x1"
    assert isinstance(error, ValueError)
