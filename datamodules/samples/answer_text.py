"""The text of a model's answer: how it is written, how it is read tolerantly, and the strict format check.

    <think>…</think><answer>```json
    {"bbox_2d": [x1, y1, x2, y2], "label": "…"}
    ```</answer>

This is the form of the paper: one box, in the image that the question means (`AnswerForm.ONE_BOX`). With
`AnswerForm.NAMED_IMAGE` the answer names the image of each box, by its number from 1. It is one such object, or a list
of them:

    [{"image": 2, "bbox_2d": [x1, y1, x2, y2], "label": "…"},
    {"image": 3, "bbox_2d": [x1, y1, x2, y2], "label": "…"}]

The four numbers are in the model's own box format; `boxes.ImageSizes` converts them. The tolerant parser also reads
boxes in slightly broken JSON (10., +10, .5, numbers in quotes, a comma before a closing bracket, full-width digits and
brackets) and boxes without JSON (`box_texts.py`). None of these earns the format reward.

A text may hold several boxes. `parse_answer` returns those from the conclusion on, so its first box is the answer. The
parser searches a conclusion only if the text has no <answer> tag and holds several boxes. The conclusion is the first
of the following that a box follows (`conclusions.py` has the words):

1. the last statement that states the answer ("The answer is …", "I would choose …")
2. the last statement that concludes ("Therefore, …")
3. the last paragraph, if it consists of boxes alone and no earlier paragraph does

If there is none of these, all boxes of the text count. Words inside JSON are never a conclusion.

No model text raises an error here, and the work on one text is bounded: a text with more than MAX_TAGS tags has no
answer, a conclusion is searched in the last MAX_CONCLUSION characters of the answer, and `box_texts.py` bounds the
rest. No regex has nested repetition, which could need exponential time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from datamodules.samples.box_texts import BoxesInText, ParsedBox, decode, is_box, is_inside, is_one_value, span_around
from datamodules.samples.conclusions import statements

FAILURE_KINDS = ("empty", "no_answer", "no_json", "bad_json", "no_box", "bad_box")
MAX_TAGS = 4_096
MAX_CONCLUSION = 8_192

# Tags with attributes or in upper case match too, so that the strict check sees and refuses them. re.ASCII: without it,
# IGNORECASE would also match Unicode characters that fold to "s" or "k".
_TAG = re.compile(r"<(/?)(think|answer)(?:\s[^<>]*+)?>", re.IGNORECASE | re.ASCII)
_BEGINNINGS = ("<think", "</think", "<answer", "</answer")  # plain text search for these is faster than _TAG
_FENCE = re.compile(r"```(?:json)?[ \t\r]*+\n(.*)```", re.DOTALL)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t\r]*+\n")
_EMPTY_LIST = re.compile(r"\[\s*+\]")
_MARKUP = re.compile(r"```(?:json)?|<\|?/?[a-z_]{1,20}\|?>", re.IGNORECASE)  # what models write around a box
_BOX = "\ufffc"  # replaces each box where only the words between boxes matter


class AnswerForm(StrEnum):
    """What an answer consists of: a property of a run, and of the model that it trains."""

    ONE_BOX = "one_box"  # one box; it names no image
    NAMED_IMAGE = "named_image"  # one or several boxes; each names its image


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer with at least one box."""

    boxes: tuple[ParsedBox, ...]  # in the order written
    thinking: str | None  # the text between the think tags; None without them


@dataclass(frozen=True)
class ParseFailure:
    """The reason why no box could be read; `kind` is one of FAILURE_KINDS.

    - empty: the text is blank.
    - no_answer: the thinking never ends, or nothing follows it.
    - no_json: the answer has no bracket.
    - bad_json: the answer has brackets, but no JSON value that decodes.
    - no_box: the answer has JSON, but no box in it.
    - bad_box: a box does not have four finite numbers.
    """

    kind: str


def has_answer_tags(text: str) -> bool:
    """Whether `text` holds a think or answer tag, in any spelling. Text inside a block must not hold such a tag."""
    return _TAG.search(text) is not None


def render_answer(values: Sequence[int | float], label: str, thinking: str | None) -> str:
    """The text that the policy should write; without `thinking` the fenced JSON alone, as the base model writes it.

    Args:
        values: the four numbers of the box, x1, y1, x2, y2, in the model's box format.
        label: the name of the object.
        thinking: the reasoning in front of the answer.

    Raises:
        ValueError: `values` are not four finite numbers, or `thinking` holds a think or answer tag.
    """
    return _render(_box_json(values, label), thinking)


def render_boxes(boxes: Sequence[ParsedBox], thinking: str | None) -> str:
    """As `render_answer`, in the form that names images: one box as an object, several as a list.

    Args:
        boxes: at least one box, each with its image's number from 1.
        thinking: the reasoning in front of the answer.

    Raises:
        ValueError: there is no box, a box names no image, or as `render_answer` says.
    """
    if not boxes or any(box.image is None or box.image < 1 for box in boxes):
        raise ValueError(f"an answer of this form has boxes, each with an image from 1, got {boxes!r}")
    objects = [_box_json(box.values, box.label or "", image=box.image) for box in boxes]
    return _render(objects[0] if len(objects) == 1 else "[" + ",\n".join(objects) + "]", thinking)


def _box_json(values: Sequence[int | float], label: str, **before: int) -> str:
    if not is_box(list(values)):
        raise ValueError(f"an answer has four finite numbers, got {values!r}")
    return json.dumps({**before, "bbox_2d": list(values), "label": label}, ensure_ascii=False)


def _render(body: str, thinking: str | None) -> str:
    if thinking is not None and has_answer_tags(thinking):
        raise ValueError(f"thinking must not hold think or answer tags: {thinking[:200]!r}")
    # "<" is escaped, so that no label can open or close a block. JSON decodes the escape to the same character.
    body = body.replace("<", "\\u003c")
    fenced = f"```json\n{body}\n```"
    return fenced if thinking is None else f"<think>{thinking}</think><answer>{fenced}</answer>"


def parse_answer(text: str, lenient: bool = False) -> ParsedAnswer | ParseFailure:
    """Read the boxes in any model text.

    The answer is the first answer block after the thinking. Without such a block it is the text after the thinking,
    from its conclusion on. Boxes under "bbox_2d" count first; without any, bare lists of four numbers count; without
    these, the forms without JSON. Broken JSON around a correct part (a missing fence, a list that was cut short) does
    not hide that part. An inverted box is returned as written; its IoU is 0.

    Args:
        text: any text that a model generated.
        lenient: also read (x1, y1, x2, y2) and <box>x1 y1 x2 y2</box>, which other models write. Meant for the
            evaluation of other models, not for training.
    """
    if not text.strip():
        return ParseFailure("empty")
    # 1. Separate the thinking from the answer.
    thinking, answer, tagged = _split(text)
    if answer is None or not answer.strip():
        return ParseFailure("no_answer")
    # 2. Find all boxes of the answer, then keep those of its conclusion.
    found = BoxesInText(answer, lenient)
    if boxes := found.counting(0 if tagged else _conclusion(answer, found)):
        return ParsedAnswer(boxes, thinking)
    # 3. No box: name the failure that comes closest to a box.
    if found.num_bad:
        return ParseFailure("bad_box")
    if found.num_values:
        return ParseFailure("no_box")
    return ParseFailure("bad_json" if "{" in answer or "[" in answer else "no_json")


def answer_text(text: str) -> str | None:
    """The text after the thinking: the answer block, or all of it without a block; None if the thinking never ends."""
    return _split(text)[1]


def states_no_box(text: str, parsed: ParsedAnswer | ParseFailure) -> bool:
    """Whether the answer says that there is no such object: by an empty list, and no box.

    Args:
        text: the model's text.
        parsed: what `parse_answer` returns for it.
    """
    answer = answer_text(text)
    return parsed == ParseFailure("no_box") and answer is not None and _EMPTY_LIST.search(answer) is not None


def is_well_formed(text: str, form: AnswerForm = AnswerForm.ONE_BOX, may_be_empty: bool = False) -> bool:
    """Whether `text` earns the format reward (paper §3.2; the paper leaves details open, this rule is exact).

    The text is one think block and then one answer block, with only white space outside. The answer is one JSON object,
    with or without a fence. Its "bbox_2d" has four finite numbers with x1 < x2 and y1 < y2. Its "label", if any, is a
    string. Empty thinking and other keys are allowed; a repeated key is not.

    With NAMED_IMAGE the answer may also be a list of at least one such object, and the "image" of every object is a
    whole number from 1. `may_be_empty` accepts an empty list too: some benchmarks have questions that no box answers.
    """
    # The four tags, each once, in this order and spelling.
    tags = _tags(text) or []
    if [tag.group() for tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    outside = text[: tags[0].start()] + text[tags[1].end() : tags[2].start()] + text[tags[3].end() :]
    if outside.strip():
        return False
    # The answer block: one JSON object, with or without a fence.
    body = text[tags[2].end() : tags[3].start()].strip()
    if body.startswith("```"):
        fenced = _FENCE.fullmatch(body)
        if fenced is None:
            return False
        body = fenced.group(1).strip()
    named = form == AnswerForm.NAMED_IMAGE
    if not body.startswith(("{", "[") if named else "{") or not is_one_value(body):
        return False
    try:
        answer = decode(body)
    except ValueError:
        return False
    objects = answer if isinstance(answer, list) else [answer]
    return (bool(objects) or may_be_empty) and all(_is_box_object(one, named) for one in objects)


def _is_box_object(value: Any, named: bool) -> bool:
    """Whether a decoded value is an object with one box; `named`: and with the number of its image."""
    # The box: four finite numbers with an area.
    if not isinstance(value, dict) or not isinstance(value.get("label", ""), str) or not is_box(value.get("bbox_2d")):
        return False
    if named:
        image = value.get("image")  # every number is decoded as a float
        if not isinstance(image, float) or image < 1 or not image.is_integer():
            return False
    x1, y1, x2, y2 = value["bbox_2d"]
    return x1 < x2 and y1 < y2


def _conclusion(answer: str, found: BoxesInText) -> int:
    """The place in `answer` where its conclusion begins (see the top of this file); 0 without a conclusion."""
    offset = max(0, len(answer) - MAX_CONCLUSION)  # only the end of a very long answer is searched
    places = found.places()
    values = [(start - offset, end - offset) for start, end in places if start >= offset]
    if not values or len(places) < 2:
        return 0
    said, concluding = 0, 0  # where the last statement of each kind begins; 0 for none
    for part in statements(answer[offset:]):
        if part.start > values[-1][0]:
            break  # no box follows from here on
        value = span_around(part.start, values)
        if value is not None and not answer[offset + value[1] : offset + part.end].strip(", \t\r"):
            continue  # a line of JSON: its words are never a conclusion, and are not searched
        span = part.said()
        if span is not None and part.start + span[0] <= values[-1][0] and not is_inside(part.start + span[0], values):
            said = part.start + span[0]
        if part.concludes() and not is_inside(part.start, values):
            concluding = part.start
    start = said or concluding or _last_paragraph(answer[offset:], values)
    return offset + start if start else 0


def _last_paragraph(answer: str, values: list[tuple[int, int]]) -> int:
    """The place where the boxes of the last paragraph begin, if only this paragraph consists of boxes alone; else 0."""
    places = [0, *(place for value in values for place in value), len(answer)]
    # Each box becomes one character, so that brackets and digits inside boxes do not count as words.
    between = [answer[start:end] for start, end in zip(places[::2], places[1::2], strict=True)]
    paragraphs = [part for part in _PARAGRAPH_BREAK.split(_BOX.join(between)) if part.strip()]
    alone = [_BOX in part and not re.search(r"\w", _MARKUP.sub(" ", part)) for part in paragraphs]
    return values[-paragraphs[-1].count(_BOX)][0] if alone[-1] and alone.count(True) == 1 else 0


def _split(text: str) -> tuple[str | None, str | None, bool]:
    """(thinking, answer, whether an <answer> tag opens the answer) of a model text.

    The answer is None if the thinking never ends, or if the text has too many tags.
    """
    tags = _tags(text)
    if tags is None:
        return None, None, False
    kinds = [(tag.group(1) + tag.group(2)).lower() for tag in tags]
    openings = [index for index, kind in enumerate(kinds) if kind == "answer"]
    closings = [index for index, kind in enumerate(kinds) if kind == "/think"]
    if openings:
        # The thinking may mention the tags. So it ends at the last </think> that an answer block follows.
        after = max((index for index in closings if index < openings[-1]), default=-1)
        opening = next(index for index in openings if index > after)
        closing = next((tags[i].start() for i in range(opening + 1, len(tags)) if kinds[i] == "/answer"), len(text))
        thinking = _thinking(text, tags[:opening], kinds, tags[opening].start())
        return thinking, text[tags[opening].end() : closing], True
    if closings:  # the thinking ends, and the answer has no tag
        return _thinking(text, tags, kinds, len(text)), text[tags[closings[-1]].end() :], False
    return None, None if "think" in kinds else text, False  # an open <think> without its end is no answer


def _tags(text: str) -> list[re.Match[str]] | None:
    """The think and answer tags in order; None if more than MAX_TAGS places begin like a tag."""
    if text.count("<") <= MAX_TAGS:
        return list(_TAG.finditer(text))
    # The regex is slow on a text with very many "<". There, plain search finds the beginnings in linear time.
    lower = text.replace("\u0130", "i").lower()  # "İ" is the only character that lower() makes longer
    if sum(lower.count(beginning) for beginning in _BEGINNINGS) > MAX_TAGS:
        return None
    places: list[int] = []
    for beginning in _BEGINNINGS:
        place = lower.find(beginning)
        while place >= 0:
            places.append(place)
            place = lower.find(beginning, place + 1)
    return [tag for place in sorted(places) if (tag := _TAG.match(text, place))]


def _thinking(text: str, tags: list[re.Match[str]], kinds: list[str], end: int) -> str | None:
    """The text between the first <think> and the last </think>; None without either tag."""
    # Some chat templates put <think> into the prompt. Then the thinking begins with the text.
    start = next((tag.end() for tag, kind in zip(tags, kinds, strict=False) if kind == "think"), None)
    closings = [tag.start() for tag, kind in zip(tags, kinds, strict=False) if kind == "/think"]
    if start is None and not closings:
        return None
    return text[start or 0 : closings[-1] if closings else end]
