"""Read the published formats of conversation records into one form: images, and questions with their answers.

The names of the fields (renamed by `OwnData.fields`) decide the format of a record, never the values:

`messages`: [{"role": "user", "content": "<image>Find …"}, {"role": "assistant", "content": …}], `images`: [file, …].
    Qwen's and OpenAI's (LLaMA-Factory, data/README.md, "OpenAI Format"). `content` may be a list of parts; the part
    {"type": "image", "image": file} contains its own file.
`conversations`: [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": …}], `image` or `images`.
    ShareGPT's and LLaVA's (LLaMA-Factory, data/README.md, "Sharegpt Format"; 2U1/Qwen-VL-Series-Finetune, README,
    "Dataset Preparation"; QwenLM/Qwen3-VL, qwen-vl-finetune/README.md, "Custom Dataset Configuration").
`messages` and `objects`: {"ref": [text, …], "bbox": [[x1, y1, x2, y2], …], "bbox_type": "real", "image_id": [0, …]}.
    ms-swift's (docs/source_en/Customization/Custom-dataset.md, "Grounding"): the tags <ref-object> and <bbox> in the
    texts are replaced by the entries, in order. "real" (the default) means pixels of the image, "norm1" means 0-1.
    `image_id` is the image of each box, counted from 0. If a "real" record has no `image_id`, that document puts all
    boxes into image 0.
`prompt`: [{"role": "user", "content": …}] or a text, `images`, and `completion` or `solution` for the answer.
    TRL's (docs/source/dataset_formats.md, "Vision datasets", "Prompt-completion"; if `content` is a text, TRL puts the
    images before the first one: `prepare_multimodal_messages`). `solution` is the column that TRL's and ms-swift's
    examples for GRPO pass to a reward: four numbers, a list of four numbers each, or a text that contains them.

Every format may also have `id`, `task`, `label` (for boxes without a label of their own), `image_id` (one image, or an
image for each box of the answer, counted from 0), and `solution` if the conversation ends with the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datamodules.importers.own_data.conversation import (
    IMAGE_TAG,
    Conversation,
    Exchange,
    read_image_ids,
    read_list,
    read_text,
)
from datamodules.importers.own_data.swift_objects import fill_objects
from datamodules.samples.sample import SampleError

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
COMMON = ("id", "task", "label", "image_id", "image", "images", "solution", "system")
FIELDS = {
    "messages": (*COMMON, "messages"),
    "conversations": (*COMMON, "conversations"),
    "objects": (*COMMON, "messages", "objects"),
    "prompt": (*COMMON, "prompt", "completion"),
    "detection": ("id", "task", "image", "file_name", "objects", "image_id", "width", "height"),
}


def field_problems(fields: Mapping[str, str]) -> list[str]:
    """The problems of `OwnData.fields`, as messages: a name that no format has, one field for two names."""
    known = dict.fromkeys(name for names in FIELDS.values() for name in names)
    unknown = [name for name in fields if name not in known]
    problems = [f"own.fields: {name!r} is a field of no format; there are {', '.join(known)}" for name in unknown]
    own = list(fields.values())
    return problems + [
        f"own.fields: two names stand for {name!r}" for name in dict.fromkeys(own) if own.count(name) > 1
    ]


def form_of(record: Mapping[str, Any], sample_id: str) -> str:
    """The format of a record, as a key of FIELDS.

    Raises:
        SampleError: "unknown_form".
    """
    # `objects` without `messages` is a detection data set; with `messages` it is ms-swift's format.
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
    """Convert the record to questions and answers.

    Raises:
        SampleError: "turn_order", "image_tags" (tags and images do not fit together), "no_images", "no_answer",
            "field_type"; for `objects` also "bbox_type", "bbox_count", "ref_count" and "box_length".
    """
    # 1. Turns, and the images in the order in which the first question shows them.
    turns = _turns(record, form, sample_id)
    has_system = "system" in record or any(role == "system" for role, _ in turns)
    turns = [turn for turn in turns if turn[0] != "system"]
    images, turns = _place_images(_images(record, sample_id), turns, sample_id)
    # 2. Questions and answers alternate. A column may contain the last answer instead.
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
    # 3. Statements of the format about boxes and their images.
    if form == "objects":
        return replace(fill_objects(record["objects"], images, pairs, sample_id), has_system=has_system)
    ids = read_image_ids(record.get("image_id"), sample_id)
    # Only a text is a box label. With another type, the field `label` means a class number, or the quality of an answer
    # (KTO).
    label = record["label"] if isinstance(record.get("label"), str) else ""
    exchanges = tuple(Exchange(question, answer, None, ids, label) for (_, question), (_, answer) in pairs)
    return Conversation(form, images, exchanges, has_system=has_system)


def _turns(record: Mapping[str, Any], form: str, sample_id: str) -> list[tuple[str, Any]]:
    """(role, content) of each turn."""
    body = record["messages" if form == "objects" else form]
    if form == "prompt":
        # TRL's standard format has texts, its conversational format messages.
        body = [{"role": "user", "content": body}] if isinstance(body, str) else read_list(body, form, sample_id)
        # The answer is a text or messages, like the prompt. It may be missing if there is a `solution`.
        completion = record.get("completion")
        if isinstance(completion, str):
            body = [*body, {"role": "assistant", "content": completion}]
        elif completion is not None:
            body = [*body, *read_list(completion, "completion", sample_id)]
    turns = []
    for number, turn in enumerate(read_list(body, form, sample_id)):
        if not isinstance(turn, Mapping):
            raise SampleError(sample_id, "field_type", f"turn {number} is no object but {turn!r:.100}")
        # The field names of OpenAI or of ShareGPT.
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is None or content is None:
            detail = f"turn {number} is {dict(turn)!r:.150}: a role (user, assistant, human, gpt) and a text are needed"
            raise SampleError(sample_id, "turn_order", detail)
        turns.append((role, content))
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
    """Returns the images in the order in which they are shown, and the turns as texts with IMAGE_TAGs."""
    # `waiting` are images of the record that no tag has used yet. A part may also contain its own file.
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
    images = images or waiting  # without any tag, all images come before the first question
    if not images:
        raise SampleError(sample_id, "no_images", "the record names no image")
    return tuple(images), placed


@dataclass(frozen=True)
class _Image:
    file: Any  # None: the next image of the record's list


def _parts(content: Any, sample_id: str) -> Iterator[str | _Image]:
    """A turn's content as texts and images, in order."""
    if isinstance(content, str):
        # There is one tag between two pieces of text, so an image precedes every piece except the first.
        for number, piece in enumerate(content.split(IMAGE_TAG)):
            yield from [_Image(None)] * bool(number)
            yield piece
        return
    for part in read_list(content, "content", sample_id):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text = read_text(part.get("text"), "text", sample_id)
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
