"""The one grammar of model answers: rendering, tolerant parsing, and the strict format check.

    <think>…</think><answer>```json
    {"bbox_2d": [x1, y1, x2, y2], "label": "…"}
    ```</answer>

The numbers are in the model's own convention; `boxes.ImageGeometry` gives them meaning. Nothing here raises on model
text, and all work is linear in its length: every regex is free of nested repetition, and the text is decoded as JSON at
most MAX_DEPTH times over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from datamodules.boxes import Box

FAILURE_KINDS = ("empty", "no_answer", "no_json", "bad_json", "no_box", "bad_box")
MAX_DEPTH = 16  # nesting beyond this is no answer; Python's decoder would recurse until it raises

# Attributes and upper case count, so that strictness can refuse them. ASCII: no Unicode
# look-alike of s or k counts.
_TAG = re.compile(r"<(/?)(think|answer)(?:\s[^<>]*+)?>", re.IGNORECASE | re.ASCII)
_STRUCTURE = re.compile(r'\\.|["\n{}\[\]]', re.DOTALL)
_DIGITS = r"([-+]?[0-9]++(?:\.[0-9]++)?)"
_NUMBER = rf"\s*+{_DIGITS}\s*+"
_PAIRS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*+,?\s*+\({_NUMBER},{_NUMBER}\)")  # Qwen2-VL: (x1,y1),(x2,y2)
# What other models write: (x1, y1, x2, y2), and MiniCPM-V's <box>x1 y1 x2 y2</box>.
_FOREIGN = re.compile(
    rf"{_PAIRS.pattern}|\({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\)|<box>{_NUMBER}{_NUMBER}{_NUMBER}{_NUMBER}</box>"
)
_FENCE = re.compile(r"```(?:json)?[ \t\r]*+\n(.*)```", re.DOTALL)


@dataclass(frozen=True)
class ParsedBox:
    """Four finite numbers as the model wrote them (its convention; possibly inverted) and the label beside them."""

    values: Box
    label: str | None


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
    if not _is_box(list(values)):
        raise ValueError(f"an answer has four finite numbers, got {values!r}")
    if thinking is not None and has_answer_tags(thinking):
        raise ValueError(f"thinking must not hold think or answer tags: {thinking[:200]!r}")
    # "<" is escaped so that no label can open or close a block; it decodes to the same string.
    body = json.dumps({"bbox_2d": list(values), "label": label}, ensure_ascii=False).replace("<", "\\u003c")
    fenced = f"```json\n{body}\n```"
    return fenced if thinking is None else f"<think>{thinking}</think><answer>{fenced}</answer>"


def parse_answer(text: str, foreign: bool = False) -> ParsedAnswer | ParseFailure:
    """Read the boxes in any model text.

    The answer is the first answer block after the thinking, or without one all that follows the thinking. In it, boxes
    under "bbox_2d" count before bare lists of four numbers, and those before the forms without JSON. Malformed JSON
    around a sound part (a missing fence, a list cut short) does not hide that part. An inverted box is read, scoring 0.
    `foreign` admits (x1, y1, x2, y2) and <box>x1 y1 x2 y2</box> too: for evaluating any model, not for training ours.
    """
    if not text.strip():
        return ParseFailure("empty")
    thinking, answer = _split(text)
    if answer is None or not answer.strip():
        return ParseFailure("no_answer")
    reader = _BoxReader()
    num_decoded = 0
    for value in _json_values(answer):
        num_decoded += 1
        reader.read(value)
    boxes = reader.keyed or reader.bare
    if not boxes:
        form = _FOREIGN if foreign else _PAIRS
        written = [tuple(float(n) for n in match.groups() if n is not None) for match in form.finditer(answer)]
        boxes = [ParsedBox(values, None) for values in written if _is_box(list(values))]
        if written and not boxes:
            return ParseFailure("bad_box")
    if boxes:
        return ParsedAnswer(tuple(boxes), thinking)
    if num_decoded:
        return ParseFailure("bad_box" if reader.num_bad else "no_box")
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
    tags = list(_TAG.finditer(text))
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
    if not body.startswith("{") or not any(span == (0, len(body)) for span in _outer_spans(body)):
        return False
    try:
        answer = _decode(body)
    except ValueError:
        return False
    if not isinstance(answer.get("label", ""), str) or not _is_box(answer.get("bbox_2d")):
        return False
    x1, y1, x2, y2 = answer["bbox_2d"]
    return x1 < x2 and y1 < y2


def _split(text: str) -> tuple[str | None, str | None]:
    """(thinking, answer) of a model text; the answer is None when the thinking never ends."""
    tags = list(_TAG.finditer(text))
    kinds = [(tag.group(1) + tag.group(2)).lower() for tag in tags]
    openings = [index for index, kind in enumerate(kinds) if kind == "answer"]
    closings = [index for index, kind in enumerate(kinds) if kind == "/think"]
    if openings:
        # Thinking may name the tags it is about to use: it ends at the last </think> that an answer block follows.
        after = max((index for index in closings if index < openings[-1]), default=-1)
        opening = next(index for index in openings if index > after)
        closing = next((tags[i].start() for i in range(opening + 1, len(tags)) if kinds[i] == "/answer"), len(text))
        return _thinking(text, tags[:opening], kinds, tags[opening].start()), text[tags[opening].end() : closing]
    if closings:
        return _thinking(text, tags, kinds, len(text)), text[tags[closings[-1]].end() :]
    return None, None if "think" in kinds else text


def _thinking(text: str, tags: list[re.Match[str]], kinds: list[str], end: int) -> str | None:
    """What stands between the first <think> (or the start, if only the prompt held it) and the last </think>."""
    start = next((tag.end() for tag, kind in zip(tags, kinds, strict=False) if kind == "think"), None)
    closings = [tag.start() for tag, kind in zip(tags, kinds, strict=False) if kind == "/think"]
    if start is None and not closings:
        return None
    return text[start or 0 : closings[-1] if closings else end]


class _BoxReader:
    """Collects boxes from decoded JSON: those under "bbox_2d", and bare lists of numbers."""

    def __init__(self) -> None:
        self.keyed: list[ParsedBox] = []
        self.bare: list[ParsedBox] = []
        self.num_bad = 0

    def read(self, value: Any, label: str | None = None, keyed: bool = False) -> None:
        """Walk one decoded value (at most MAX_DEPTH deep)."""
        if isinstance(value, dict) and not keyed:
            label = value["label"] if isinstance(value.get("label"), str) else None
            for key, item in value.items():
                if key == "bbox_2d" or isinstance(item, dict | list):
                    self.read(item, label, keyed=key == "bbox_2d")
        elif _is_box(value):
            (self.keyed if keyed else self.bare).append(ParsedBox(tuple(value), label))
        elif isinstance(value, list) and value and all(isinstance(item, dict | list) for item in value):
            for item in value:
                self.read(item, label, keyed)
        elif keyed or (isinstance(value, list) and any(_is_number(item) for item in value)):
            self.num_bad += 1
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict | list):
                    self.read(item, label)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 4 and all(_is_number(item) and math.isfinite(item) for item in value)
    )


def _json_values(text: str) -> Iterator[Any]:
    """The outermost balanced bracket pairs in `text` that decode as JSON, in order; where one does not, those in it."""
    done = 0
    for start, end in _outer_spans(text):
        if start < done:
            continue
        try:
            # A slice, not an offset: the decoder's error message counts lines from the start of what it was given.
            value = _decode(text[start:end], unique_keys=False)
        except ValueError:
            continue
        done = end
        yield value


def _outer_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the balanced bracket pairs at most MAX_DEPTH high, outer before inner, in order of start."""
    starts: list[int] = []
    ends: list[int | None] = []
    open_pairs: list[list[int]] = []  # [index into starts, height of what it holds]
    in_string = False
    for match in _STRUCTURE.finditer(text):
        token = match.group()
        if token == '"' or token == "\n":
            # A quote in prose is no string, and JSON strings hold no raw line break: an unclosed one ends there.
            in_string = token == '"' and not in_string and bool(open_pairs)
        elif in_string or token[0] == "\\":
            continue
        elif token in "{[":
            open_pairs.append([len(starts), 1])
            starts.append(match.start())
            ends.append(None)
        elif not open_pairs or text[starts[open_pairs[-1][0]]] != ("{" if token == "}" else "["):
            open_pairs.clear()
        else:
            index, height = open_pairs.pop()
            if height <= MAX_DEPTH:
                ends[index] = match.end()
            if open_pairs:
                open_pairs[-1][1] = max(open_pairs[-1][1], height + 1)
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end is not None]


def _decode(text: str, unique_keys: bool = True) -> Any:
    """Strict JSON of bounded depth: no NaN or Infinity, and a number too large for a float becomes inf."""
    hook = _reject_repeated_keys if unique_keys else None
    # float also for integers: int() refuses more than 4,300 digits and takes quadratic time below that.
    return json.loads(text, parse_int=float, parse_constant=_reject_constant, object_pairs_hook=hook)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("a key is given twice")
    return decoded
