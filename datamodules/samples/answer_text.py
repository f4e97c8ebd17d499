"""The one grammar of model answers: rendering, tolerant parsing, and the strict format check.

    <think>…</think><answer>```json
    {"bbox_2d": [x1, y1, x2, y2], "label": "…"}
    ```</answer>

The numbers are in the model's own box format; `boxes.ImageSizes` gives them meaning. The tolerant parser also reads
boxes whose JSON is slightly broken (10., +10, .5, numbers in quotes, a comma before a closing bracket, full-width
digits and brackets) and forms without JSON (`box_texts.py`); none of these earns the format reward.

Which of several boxes is the answer: `parse_answer` lists them from the conclusion on, so that the first one is it. The
conclusion is looked for only where no <answer> tag says where the answer begins, and only where the answer holds
several boxes. It begins at the first of these that a box follows (`conclusions.py` has the words):

1. the last statement that says the answer ("The answer is …", "I would choose …")
2. the last statement that concludes ("Therefore, …")
3. the last paragraph, if it is boxes and nothing else and no paragraph before it is

Without any of these it begins with the text. Words inside JSON conclude nothing.

Nothing here raises on model text, and the work on a text is bounded whatever it holds: a text with more than MAX_TAGS
tags has no answer, a conclusion is looked for in the last MAX_CONCLUSION characters of the answer, and `box_texts.py`
bounds the rest. Every regex is free of nested repetition.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.samples.box_texts import BoxesInText, ParsedBox, decode, is_box, is_inside, is_one_value
from datamodules.samples.conclusions import statements

FAILURE_KINDS = ("empty", "no_answer", "no_json", "bad_json", "no_box", "bad_box")
MAX_TAGS = 4_096
MAX_CONCLUSION = 8_192

# Attributes and upper case count, so that strictness can refuse them. ASCII: no Unicode
# look-alike of s or k counts.
_TAG = re.compile(r"<(/?)(think|answer)(?:\s[^<>]*+)?>", re.IGNORECASE | re.ASCII)
_BEGINNINGS = ("<think", "</think", "<answer", "</answer")
_FENCE = re.compile(r"```(?:json)?[ \t\r]*+\n(.*)```", re.DOTALL)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t\r]*+\n")
_MARKUP = re.compile(r"```(?:json)?|<\|?/?[a-z_]{1,20}\|?>", re.IGNORECASE)  # round a box
_BOX = "\ufffc"  # stands for a box where only the words between boxes matter


@dataclass(frozen=True)
class ParsedAnswer:
    """At least one box, in the order written."""

    boxes: tuple[ParsedBox, ...]
    thinking: str | None


@dataclass(frozen=True)
class ParseFailure:
    """Why no box could be read; `kind` is one of FAILURE_KINDS.

    empty: blank text. no_answer: the thinking never ends, or nothing follows it. no_json: no bracket in the answer.
    bad_json: brackets, but nothing that decodes. no_box: JSON without a box. bad_box: not four finite numbers.
    """

    kind: str


def has_answer_tags(text: str) -> bool:
    """Whether `text` holds anything that reads as a think or answer tag, and so cannot stand inside a block."""
    return _TAG.search(text) is not None


def render_answer(values: Sequence[int | float], label: str, thinking: str | None) -> str:
    """The text that a policy should write. Without `thinking` it is the fenced JSON alone, as the base model writes it.

    Raises ValueError if `values` are not four finite numbers or `thinking` holds a tag.
    """
    if not is_box(list(values)):
        raise ValueError(f"an answer has four finite numbers, got {values!r}")
    if thinking is not None and has_answer_tags(thinking):
        raise ValueError(f"thinking must not hold think or answer tags: {thinking[:200]!r}")
    # "<" is escaped so that no label can open or close a block; it decodes to the same string.
    body = json.dumps({"bbox_2d": list(values), "label": label}, ensure_ascii=False).replace("<", "\\u003c")
    fenced = f"```json\n{body}\n```"
    return fenced if thinking is None else f"<think>{thinking}</think><answer>{fenced}</answer>"


def parse_answer(text: str, lenient: bool = False) -> ParsedAnswer | ParseFailure:
    """Read the boxes in any model text.

    The answer is the first answer block after the thinking, or without one all that follows the thinking, from its
    conclusion on. In it, boxes under "bbox_2d" count before bare lists of four numbers, and those before the forms
    without JSON. Malformed JSON around a sound part (a missing fence, a list cut short) does not hide that part. An
    inverted box is read, scoring 0. `lenient` admits (x1, y1, x2, y2) and <box>x1 y1 x2 y2</box> too: for evaluating
    any model, not for training ours.
    """
    if not text.strip():
        return ParseFailure("empty")
    thinking, answer, tagged = _split(text)
    if answer is None or not answer.strip():
        return ParseFailure("no_answer")
    found = BoxesInText(answer, lenient)
    if boxes := found.counting(0 if tagged else _conclusion(answer, found)):
        return ParsedAnswer(boxes, thinking)
    if found.num_bad:
        return ParseFailure("bad_box")
    if found.num_values:
        return ParseFailure("no_box")
    return ParseFailure("bad_json" if "{" in answer or "[" in answer else "no_json")


def answer_text(text: str) -> str | None:
    """What the model answers after its thinking: the answer block, else the rest; None when the thinking never ends."""
    return _split(text)[1]


def is_well_formed(text: str) -> bool:
    """The format reward's condition (paper §3.2, made exact): one think block, then one answer block, nothing outside
    but white space, and in the answer one JSON object, fenced or not, with "bbox_2d" of four finite numbers,
    x1 < x2 and y1 < y2.

    Empty thinking is allowed; so are other keys, but no key may be given twice and "label" must be a string.
    """
    tags = _tags(text) or []
    if [tag.group() for tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    outside = text[: tags[0].start()] + text[tags[1].end() : tags[2].start()] + text[tags[3].end() :]
    if outside.strip():
        return False
    body = text[tags[2].end() : tags[3].start()].strip()
    if body.startswith("```"):
        fenced = _FENCE.fullmatch(body)
        if fenced is None:
            return False
        body = fenced.group(1).strip()
    if not body.startswith("{") or not is_one_value(body):
        return False
    try:
        answer = decode(body)
    except ValueError:
        return False
    if not isinstance(answer.get("label", ""), str) or not is_box(answer.get("bbox_2d")):
        return False
    x1, y1, x2, y2 = answer["bbox_2d"]
    return x1 < x2 and y1 < y2


def _conclusion(answer: str, found: BoxesInText) -> int:
    """Where the conclusion of an answer begins, of those that boxes follow; 0 without one."""
    offset = max(0, len(answer) - MAX_CONCLUSION)
    values = [(start - offset, end - offset) for start, end in found.places() if start >= offset]
    if not values or len(found.places()) < 2:
        return 0
    said, concluding = 0, 0
    for part in statements(answer[offset:]):
        if part.start > values[-1][0]:
            break
        span = part.said()
        if span is not None and part.start + span[0] <= values[-1][0] and not is_inside(part.start + span[0], values):
            said = part.start + span[0]
        if part.concludes() and not is_inside(part.start, values):
            concluding = part.start
    start = said or concluding or _last_paragraph(answer[offset:], values)
    return offset + start if start else 0


def _last_paragraph(answer: str, values: list[tuple[int, int]]) -> int:
    """Where the boxes of the last paragraph begin, if it alone is boxes and nothing else; else 0."""
    places = [0, *(place for value in values for place in value), len(answer)]
    between = [answer[start:end] for start, end in zip(places[::2], places[1::2], strict=True)]
    paragraphs = [part for part in _PARAGRAPH_BREAK.split(_BOX.join(between)) if part.strip()]
    alone = [_BOX in part and not re.search(r"\w", _MARKUP.sub(" ", part)) for part in paragraphs]
    return values[-paragraphs[-1].count(_BOX)][0] if alone[-1] and alone.count(True) == 1 else 0


def _split(text: str) -> tuple[str | None, str | None, bool]:
    """(thinking, answer, whether an answer tag opens it) of a model text; no answer when the thinking never ends."""
    tags = _tags(text)
    if tags is None:
        return None, None, False
    kinds = [(tag.group(1) + tag.group(2)).lower() for tag in tags]
    openings = [index for index, kind in enumerate(kinds) if kind == "answer"]
    closings = [index for index, kind in enumerate(kinds) if kind == "/think"]
    if openings:
        # Thinking may name the tags it is about to use: it ends at the last </think> that an answer block follows.
        after = max((index for index in closings if index < openings[-1]), default=-1)
        opening = next(index for index in openings if index > after)
        closing = next((tags[i].start() for i in range(opening + 1, len(tags)) if kinds[i] == "/answer"), len(text))
        thinking = _thinking(text, tags[:opening], kinds, tags[opening].start())
        return thinking, text[tags[opening].end() : closing], True
    if closings:
        return _thinking(text, tags, kinds, len(text)), text[tags[closings[-1]].end() :], False
    return None, None if "think" in kinds else text, False


def _tags(text: str) -> list[re.Match[str]] | None:
    """The think and answer tags in order; None for more than MAX_TAGS places that begin like one.

    Where there are many "<", the beginnings are counted and found by plain search, which is fast for any text.
    """
    if text.count("<") <= MAX_TAGS:
        return list(_TAG.finditer(text))
    lower = text.replace("\u0130", "i").lower()  # the one character that lower() makes two of
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
    """What stands between the first <think> (or the start, if only the prompt held it) and the last </think>."""
    start = next((tag.end() for tag, kind in zip(tags, kinds, strict=False) if kind == "think"), None)
    closings = [tag.start() for tag, kind in zip(tags, kinds, strict=False) if kind == "/think"]
    if start is None and not closings:
        return None
    return text[start or 0 : closings[-1] if closings else end]
