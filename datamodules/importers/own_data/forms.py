"""The published forms of a record with a conversation, as one: images, and questions with the answers to them.

Which form a record has is told by the names of its fields (renamed by `OwnData.fields`), never by its values:

`messages`: [{"role": "user", "content": "<image>Find …"}, {"role": "assistant", "content": …}], `images`: [file, …].
    Qwen's and OpenAI's (LLaMA-Factory, data/README.md, "OpenAI Format"). `content` may be a list of parts, of which
    {"type": "image", "image": file} brings its file along.
`conversations`: [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": …}], `image` or `images`.
    ShareGPT's and LLaVA's (LLaMA-Factory, data/README.md, "Sharegpt Format"; 2U1/Qwen-VL-Series-Finetune, README,
    "Dataset Preparation"; QwenLM/Qwen3-VL, qwen-vl-finetune/README.md, "Custom Dataset Configuration").
`messages` and `objects`: {"ref": [text, …], "bbox": [[x1, y1, x2, y2], …], "bbox_type": "real", "image_id": [0, …]}.
    ms-swift's (docs/source_en/Customization/Custom-dataset.md, "Grounding"): <ref-object> and <bbox> in the texts stand
    for them, each in its own order. "real" (the default) is pixels of the image, "norm1" is 0-1. `image_id` says which
    image a box is in, counted from 0; by that document all are in image 0 where a "real" record has none.
`prompt`: [{"role": "user", "content": …}] or a text, `images`, and `completion` or `solution` for the answer.
    TRL's (docs/source/dataset_formats.md, "Vision datasets", "Prompt-completion"; where `content` is a text, TRL puts
    the images before the first one: `prepare_multimodal_messages`). `solution` is the column that TRL's and ms-swift's
    examples for GRPO pass to a reward: four numbers, a list of such, or a text with them.

Beside them every form may have `id`, `task`, `label` (of a box that names none), `image_id` (an image or one for each
box of the answer, counted from 0), and `solution` where the conversation ends with the question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.importers.own_data.coordinates import read_numbers
from datamodules.importers.own_data.statement import Coordinates
from datamodules.samples.sample import SampleError

IMAGE_TAG = "<image>"
REF_TAG, BOX_TAG = "<ref-object>", "<bbox>"
# The tokens by which Qwen2-VL marks a phrase; in an answer they tell the label of the box behind them.
MARKED = "<|object_ref_start|>{}<|object_ref_end|>"
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
COMMON = ("id", "task", "label", "image_id", "image", "images", "solution", "system")
FIELDS = {
    "messages": (*COMMON, "messages"),
    "conversations": (*COMMON, "conversations"),
    "objects": (*COMMON, "messages", "objects"),
    "prompt": (*COMMON, "prompt", "completion"),
    "detection": ("id", "task", "image", "file_name", "objects", "image_id", "width", "height"),
}


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    The first question of a record shows its images where the IMAGE_TAGs are; without any they come before it.
    `question_images` and `answer_images` are those of the boxes there, where the record or the form says them;
    `num_boxes` is how many there must be, where the form counts them.
    """

    question: str
    answer: Any
    question_images: tuple[int, ...] | None = None
    answer_images: tuple[int, ...] | None = None
    label: str = ""
    num_boxes: tuple[int, int] | None = None  # in the question, in the answer


@dataclass(frozen=True)
class Conversation:
    """A record's images and exchanges. `coordinates` are what the form says of its boxes, None where it says nothing;
    `is_stated` is whether the record itself says it. `by_default` is whether the form, and not the record, says which
    images boxes are in."""

    form: str
    images: tuple[Any, ...]
    exchanges: tuple[Exchange, ...]
    coordinates: Coordinates | None = None
    is_stated: bool = False
    by_default: bool = False


def form_of(record: Mapping[str, Any], sample_id: str) -> str:
    """The record's form, a key of FIELDS. Raises SampleError "unknown_form"."""
    objects = record.get("objects")
    bodies = [name for name in ("messages", "conversations", "prompt") if record.get(name) is not None]
    if not bodies and isinstance(objects, Mapping) and "bbox" in objects:
        return "detection"
    if len(bodies) != 1:
        found = ", ".join(map(str, list(record)[:20]))
        detail = f"one of messages, conversations and prompt is needed, found the fields {found}"
        raise SampleError(sample_id, "unknown_form", f"{detail}; --own.fields renames them")
    return "objects" if bodies == ["messages"] and objects is not None else bodies[0]


def read_conversation(record: Mapping[str, Any], form: str, sample_id: str) -> Conversation:
    """The record as questions and answers.

    Raises SampleError: "turn_order", "image_tags" (tags and images do not fit together), "no_images", "no_answer",
    "field_type", and for `objects` "bbox_type", "bbox_count", "ref_count", "box_length".
    """
    turns = _turns(record, form, sample_id)
    images, turns = _place_images(_images(record, sample_id), turns, sample_id)
    solution = record.get("solution")
    if [role for role, _ in turns] == ["user"] and solution is not None:
        turns.append(("assistant", solution))
    roles = [role for role, _ in turns]
    if roles == ["user"]:
        raise SampleError(
            sample_id, "no_answer", "neither an assistant's turn nor a field solution answers the question"
        )
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise SampleError(sample_id, "turn_order", f"the turns are {roles}, not user and assistant in turn")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    if form == "objects":
        return _with_objects(record["objects"], images, pairs, sample_id)
    ids = _image_ids(record.get("image_id"), sample_id)
    label = _text(record.get("label") or "", "label", sample_id)
    exchanges = tuple(Exchange(question, answer, None, ids, label) for (_, question), (_, answer) in pairs)
    return Conversation(form, images, exchanges)


def _turns(record: Mapping[str, Any], form: str, sample_id: str) -> list[tuple[str, Any]]:
    """(role, content) of each turn, without the system's."""
    body = record["messages" if form == "objects" else form]
    if form == "prompt":
        # TRL's standard format has texts, its conversational format messages.
        body = [{"role": "user", "content": body}] if isinstance(body, str) else as_list(body)
        completion = record.get("completion")
        if isinstance(completion, str):
            body = [*body, {"role": "assistant", "content": completion}]
        elif completion is not None:
            body = [*body, *_listed(completion, "completion", sample_id)]
    turns = []
    for number, turn in enumerate(_listed(body, form, sample_id)):
        if not isinstance(turn, Mapping):
            raise SampleError(sample_id, "field_type", f"turn {number} is no object but {turn!r:.100}")
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is None or content is None:
            detail = f"turn {number} is {dict(turn)!r:.150}: a role (user, assistant, human, gpt) and a text are needed"
            raise SampleError(sample_id, "turn_order", detail)
        turns += [(role, content)] if role != "system" else []
    return turns


def _images(record: Mapping[str, Any], sample_id: str) -> list[Any]:
    """The record's own list of images."""
    given = [record[name] for name in ("images", "image") if record.get(name) is not None]
    if len(given) > 1:
        raise SampleError(sample_id, "field_type", "the record has both image and images")
    if not given:
        return []
    return list(given[0]) if isinstance(given[0], list | tuple) else [given[0]]


def _place_images(
    listed: Sequence[Any], turns: Sequence[tuple[str, Any]], sample_id: str
) -> tuple[tuple[Any, ...], list[tuple[str, Any]]]:
    """The images in the order in which they are shown, and the turns as texts with IMAGE_TAGs."""
    waiting, images, placed = list(listed), [], []
    for number, (role, content) in enumerate(turns):
        text = ""
        for part in _parts(content, sample_id):
            if isinstance(part, str):
                text += part
                continue
            if number or role != "user":
                raise SampleError(sample_id, "image_tags", f"turn {number} shows an image; only the first one may")
            if part.file is None and not waiting:
                detail = f"more {IMAGE_TAG} tags than the {len(listed)} images of the record"
                raise SampleError(sample_id, "image_tags", detail)
            images.append(waiting.pop(0) if part.file is None else part.file)
            text += IMAGE_TAG
        placed.append((role, text))
    if waiting and images:
        raise SampleError(sample_id, "image_tags", f"{len(waiting)} of {len(listed)} images have no {IMAGE_TAG} tag")
    images = images or waiting  # without any tag: all before the first question
    if not images:
        raise SampleError(sample_id, "no_images", "the record names no image")
    return tuple(images), placed


@dataclass(frozen=True)
class _Image:
    file: Any  # None: the next of the record's list


def _parts(content: Any, sample_id: str) -> Iterator[str | _Image]:
    """A turn's content as texts and images, in order."""
    if isinstance(content, str):
        for number, piece in enumerate(content.split(IMAGE_TAG)):
            yield from [_Image(None)] * bool(number)
            yield piece
        return
    for part in _listed(content, "content", sample_id):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text = _text(part.get("text"), "text", sample_id)
            if IMAGE_TAG in text:
                raise SampleError(
                    sample_id, "image_tags", f"a text part holds {IMAGE_TAG}, which parts are no place for"
                )
            yield text
        elif kind == "image":
            yield _Image(part.get("image"))
        elif kind == "image_url":
            url = part.get("image_url")
            yield _Image(url.get("url") if isinstance(url, Mapping) else url)
        else:
            raise SampleError(sample_id, "field_type", f"a part is of type text, image or image_url, got {part!r:.100}")


def _with_objects(
    objects: Any, images: tuple[Any, ...], pairs: Sequence[tuple[tuple, tuple]], sample_id: str
) -> Conversation:
    """ms-swift's form: the tags in the texts replaced by the phrases and boxes of `objects`."""
    if not isinstance(objects, Mapping):
        raise SampleError(sample_id, "field_type", f"objects is no object with ref and bbox but {objects!r:.100}")
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise SampleError(sample_id, "bbox_type", f"objects.bbox_type is {kind!r:.50}, neither real nor norm1")
    refs = [_text(ref, "ref", sample_id) for ref in _listed(objects.get("ref") or [], "objects.ref", sample_id)]
    boxes = [
        json.dumps(read_numbers(box, sample_id)) for box in _listed(objects.get("bbox"), "objects.bbox", sample_id)
    ]
    if tagged := [ref for ref in refs if any(tag in ref for tag in (REF_TAG, BOX_TAG, IMAGE_TAG))]:
        raise SampleError(sample_id, "ref_count", f"objects.ref holds a tag: {tagged[0]!r:.100}")
    texts = [text if isinstance(text, str) else str(text) for pair in pairs for _, text in pair]
    for tag, values, rule in ((REF_TAG, refs, "ref_count"), (BOX_TAG, boxes, "bbox_count")):
        if (found := sum(text.count(tag) for text in texts)) != len(values):
            raise SampleError(sample_id, rule, f"{found} tags {tag} for {len(values)} in objects")
    ids = _image_ids(objects.get("image_id"), sample_id)
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
    """Exchanges of texts (question, answer, question, …) with phrases and boxes in the places of their tags."""
    done, label = 0, ""
    refs_left, boxes_left = iter(refs), iter(boxes)
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        asked, given = question.count(BOX_TAG), answer.count(BOX_TAG)
        named = [next(refs_left) for _ in range(question.count(REF_TAG))]
        label = named[-1] if named else label
        # Written as lists, the boxes are read like those of any other text, to the last digit.
        question = _fill(_fill(question, REF_TAG, iter(named)), BOX_TAG, boxes_left)
        in_json = '"bbox_2d"' in answer or '"label"' in answer
        answer = _fill(answer, REF_TAG, (_in_answer(ref, in_json) for ref in refs_left))
        answer = _fill(answer, BOX_TAG, boxes_left)
        middle, end = done + asked, done + asked + given
        places = (None, None) if ids is None else (ids[done:middle], ids[middle:end])
        yield Exchange(question, answer, *places, label, (asked, given))
        done = end


def _in_answer(ref: str, in_json: bool) -> str:
    """A phrase as it stands in an answer: as the text of a JSON string, or marked as the label of the next box."""
    return json.dumps(ref, ensure_ascii=False)[1:-1] if in_json else MARKED.format(ref)


def _fill(text: str, tag: str, values: Iterator[str]) -> str:
    first, *rest = text.split(tag)
    return first + "".join(next(values) + piece for piece in rest)


def _image_ids(value: Any, sample_id: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    values = list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in values):
        raise SampleError(sample_id, "image_id", f"image_id should be numbers of images from 0, got {value!r:.100}")
    return tuple(values)


def as_list(value: Any) -> Any:
    """A list of objects, also where the library `datasets` has made an object of lists of it."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(items, list) for items in value.values()):
        return value
    return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]


def _listed(value: Any, name: str, sample_id: str) -> list[Any]:
    value = as_list(value)
    if not isinstance(value, list | tuple):
        raise SampleError(sample_id, "field_type", f"{name} is no list but {value!r:.100}")
    return list(value)


def _text(value: Any, name: str, sample_id: str) -> str:
    if not isinstance(value, str):
        raise SampleError(sample_id, "field_type", f"{name} is no text but {value!r:.100}")
    return value
