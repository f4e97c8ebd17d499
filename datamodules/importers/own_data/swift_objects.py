"""ms-swift's `objects`: phrases and boxes that replace the tags <ref-object> and <bbox> in the texts.

`forms.py` names its documentation. Over all turns of a record, each entry of `ref` replaces the next <ref-object>, and
each entry of `bbox` the next <bbox>. The two lists are counted separately.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datamodules.importers.own_data.conversation import (
    IMAGE_TAG,
    Conversation,
    Exchange,
    read_image_ids,
    read_list,
    read_text,
)
from datamodules.importers.own_data.coordinates import read_numbers
from datamodules.importers.own_data.statement import Coordinates
from datamodules.samples.sample import SampleError

REF_TAG, BOX_TAG = "<ref-object>", "<bbox>"
# The tokens with which Qwen2-VL marks a phrase. In an answer, the marked phrase is the label of the box after it.
MARKED = "<|object_ref_start|>{}<|object_ref_end|>"


def fill_objects(
    objects: Any, images: tuple[Any, ...], pairs: Sequence[tuple[tuple, tuple]], sample_id: str
) -> Conversation:
    """The conversation with the tags in its texts replaced.

    Args:
        objects: {"ref": phrases, "bbox": boxes, "bbox_type": "real" or "norm1", "image_id": an image for each box}.
        images: images of the record.
        pairs: (role, text) of each question and of its answer.
        sample_id: id of the record, for the errors.

    Raises:
        SampleError: "bbox_type", "bbox_count", "ref_count", "image_id", "box_length" or "field_type".
    """
    if not isinstance(objects, Mapping):
        raise SampleError(sample_id, "field_type", f"objects is no object with ref and bbox but {objects!r:.100}")
    # 1. The entries: phrases, boxes, and the format of the boxes.
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise SampleError(sample_id, "bbox_type", f"objects.bbox_type is {kind!r:.50}, neither real nor norm1")
    refs = [read_text(ref, "ref", sample_id) for ref in read_list(objects.get("ref") or [], "objects.ref", sample_id)]
    boxes = [
        json.dumps(read_numbers(box, sample_id)) for box in read_list(objects.get("bbox"), "objects.bbox", sample_id)
    ]
    # A tag inside a phrase would be replaced too, and shift all later entries.
    if tagged := [ref for ref in refs if any(tag in ref for tag in (REF_TAG, BOX_TAG, IMAGE_TAG))]:
        raise SampleError(sample_id, "ref_count", f"objects.ref holds a tag: {tagged[0]!r:.100}")
    # 2. The numbers of tags and entries must be equal over the whole record; otherwise a box would get another phrase.
    texts = [text if isinstance(text, str) else str(text) for pair in pairs for _, text in pair]
    for tag, values, rule in ((REF_TAG, refs, "ref_count"), (BOX_TAG, boxes, "bbox_count")):
        if (found := sum(text.count(tag) for text in texts)) != len(values):
            raise SampleError(sample_id, rule, f"{found} tags {tag} for {len(values)} in objects")
    # 3. The image of each box. Without `image_id`, ms-swift puts "real" boxes into image 0.
    ids = read_image_ids(objects.get("image_id"), sample_id)
    if ids is not None and len(ids) != len(boxes):
        raise SampleError(sample_id, "image_id", f"objects.image_id has {len(ids)} numbers for {len(boxes)} boxes")
    by_default = ids is None and kind == "real"
    exchanges = _fill_tags(texts, refs, boxes, (0,) * len(boxes) if by_default else ids)
    coordinates: Coordinates = "pixels" if kind == "real" else "normalized"
    is_stated = objects.get("bbox_type") is not None
    return Conversation("objects", images, tuple(exchanges), coordinates, is_stated, by_default)


def _fill_tags(
    texts: Sequence[str], refs: Sequence[str], boxes: Sequence[str], ids: tuple[int, ...] | None
) -> Iterator[Exchange]:
    """Make exchanges of texts (question, answer, question, …), with phrases and boxes in place of their tags."""
    # `done` counts the boxes used so far; `label` is the last phrase of a question, also from an earlier turn.
    done, label = 0, ""
    refs_left, boxes_left = iter(refs), iter(boxes)
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        asked, given = question.count(BOX_TAG), answer.count(BOX_TAG)
        named = [next(refs_left) for _ in range(question.count(REF_TAG))]
        label = named[-1] if named else label
        # Boxes are written as lists, so that they are parsed exactly like boxes in any other text.
        question = _fill(_fill(question, REF_TAG, iter(named)), BOX_TAG, boxes_left)
        in_json = '"bbox_2d"' in answer or '"label"' in answer
        answer = _fill(answer, REF_TAG, (_in_answer(ref, in_json) for ref in refs_left))
        answer = _fill(answer, BOX_TAG, boxes_left)
        middle, end = done + asked, done + asked + given
        places = (None, None) if ids is None else (ids[done:middle], ids[middle:end])
        yield Exchange(question, answer, *places, label, (asked, given))
        done = end


def _in_answer(ref: str, in_json: bool) -> str:
    """A phrase in an answer: the text inside a JSON string, or marked as the label of the next box."""
    return json.dumps(ref, ensure_ascii=False)[1:-1] if in_json else MARKED.format(ref)


def _fill(text: str, tag: str, values: Iterator[str]) -> str:
    first, *rest = text.split(tag)
    return first + "".join(next(values) + piece for piece in rest)
