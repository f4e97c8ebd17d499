"""Find the boxes in the text of an answer: in JSON, in slightly broken JSON, and in other models' notations.

This parser accepts some notations that a person can read although JSON forbids them: numbers such as 10., .5, +10 and
010, numbers in quotes, a comma before the closing bracket, and full-width digits, signs and brackets. A list with
anything else (units, words, other separators, a missing or a fifth number) is not a box. The strict format check
(`answer_text.is_well_formed`) accepts none of these notations.

The work on one text is bounded, so that 1 MB of any text takes a few milliseconds. A value that is nested deeper than
MAX_DEPTH is ignored, and reading stops after MAX_VALUES bracket pairs. Some characters cost work: brackets, commas,
quotes, line breaks, "\\" and "<". In a text with more than MAX_MARKS of them, only the first EXCERPT / 2 characters and
an excerpt of EXCERPT characters around the last opening bracket are read. Full-width characters are read in texts of up
to 16 * EXCERPT characters.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datamodules.persistence.strict_json import refuse_constant, unique_keys
from datamodules.samples.boxes import Box

MAX_DEPTH = 16  # nested brackets; Python's decoder recurses and would raise RecursionError
MAX_VALUES = 1_000  # bracket pairs of one text
MAX_MARKS = 4_096  # characters of one text that cost work
EXCERPT = 4_096  # characters
MAX_REPAIRED = 2_048  # characters of one broken value; of a longer value only its parts are read
MAX_REPAIRS = 65_536  # characters of all broken values together

_MARKS = '{}[]()"\n\\,<'  # the characters that cost work
_ESCAPED = r"\\[\s\S]"  # a backslash hides the character behind it
# The next bracket outside all pairs, where a quote is prose; and the next bracket or string inside a pair. A JSON
# string holds no raw line break, so an open string ends there, or with the text.
_OPENING = re.compile(rf"{_ESCAPED}|[{{\[]")
_INSIDE = re.compile(rf'{_ESCAPED}|"(?:[^"\\\n]++|{_ESCAPED})*+(?:["\n]|\\?\Z)|[{{}}\[\]]')
_NUMBER = r"\s*+([-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+"
_QUOTED = rf"\s*+[\"'“”]?{_NUMBER}[\"'“”]?\s*+"
_FOUR = ",".join([_QUOTED] * 4)
_LIST = re.compile(rf"\[{_FOUR},?\s*+\]")
_PAIRS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*+,?\s*+\({_NUMBER},{_NUMBER}\)")  # Qwen2-VL: (x1,y1),(x2,y2)
_WRITTEN = re.compile(rf"{_LIST.pattern}|{_PAIRS.pattern}")
# Notations of other models: (x1, y1, x2, y2), and MiniCPM-V's <box>x1 y1 x2 y2</box>.
_LENIENT = re.compile(
    rf"{_WRITTEN.pattern}|\({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\)|<box>{_NUMBER}{_NUMBER}{_NUMBER}{_NUMBER}</box>"
)
_QUOTED_NUMBER = re.compile(_NUMBER)
_TRAILING_COMMA = re.compile(r",(\s*+[}\]])")
# Full-width forms (U+FF01 to U+FF5E) -> ASCII, as Chinese keyboards and models write them.
_FULL_WIDTH = {0xFF01 + offset: chr(0x21 + offset) for offset in range(94)} | {ord("【"): "[", ord("】"): "]"}
_WIDE = re.compile("[\uff01-\uff5e【】]++")


@dataclass(frozen=True)
class ParsedBox:
    """Four finite numbers as the model wrote them (in its box format, possibly inverted) and the label beside them."""

    values: Box
    label: str | None
    image: int | None = None  # the number under "image", from 1; None where no whole number is there


@dataclass(frozen=True)
class PlacedBox:
    """A box and its span [start, end) in the text: a whole JSON value, or one box without JSON."""

    box: ParsedBox
    start: int
    end: int


_Beside = tuple[str | None, int | None]  # the label and the image's number beside a box
_NOTHING: _Beside = (None, None)


class BoxesInText:
    """All boxes of a text, in three kinds; `counting` chooses the kind that counts."""

    def __init__(self, text: str, lenient: bool) -> None:
        self.keyed: list[PlacedBox] = []  # under "bbox_2d" in JSON
        self.bare: list[PlacedBox] = []  # lists of four numbers without this key
        self.written: list[PlacedBox] = []  # notations without JSON
        self.num_bad = 0  # number of lists that should be a box but are not valid
        self.num_values = 0  # number of JSON values
        for start, end in _read_parts(text):
            self._read_part(text[start:end], start, lenient)

    def places(self) -> list[tuple[int, int]]:
        """[start, end) of every part of the text that contains a box, in order. No two parts overlap."""
        return sorted({(placed.start, placed.end) for placed in self.keyed + self.bare + self.written})

    def counting(self, start: int = 0) -> tuple[ParsedBox, ...]:
        """The boxes from the place `start` on, in the order written: keyed boxes, else bare ones, else written ones."""
        for boxes in (self.keyed, self.bare, self.written):
            if found := tuple(placed.box for placed in boxes if placed.start >= start):
                return found
        return ()

    def read(self, value: Any, start: int = 0, end: int = 0) -> bool:
        """Add the boxes of one decoded value at the place [start, end); returns whether it has any."""
        before = len(self.keyed) + len(self.bare)
        self._read(value, start, end)
        return len(self.keyed) + len(self.bare) > before

    def _read_part(self, text: str, offset: int, lenient: bool) -> None:
        # 1. JSON values, exact or repaired.
        decoded: list[tuple[int, int]] = []
        for start, end, value in _json_values(text):
            decoded.append((start, end))
            self.read(value, offset + start, offset + end)
        self.num_values += len(decoded)
        # 2. Notations without JSON, in the text between these values.
        for found in _written(text, lenient):
            if is_inside(found.start(), decoded):
                continue
            values = [float(number) for number in found.groups() if number is not None]
            if is_box(values):
                kind = self.bare if found[0].startswith("[") else self.written
                kind.append(PlacedBox(ParsedBox(tuple(values), None), offset + found.start(), offset + found.end()))
            else:
                self.num_bad += 1
        self.bare.sort(key=lambda placed: placed.start)  # stable: boxes of one JSON value stay in order

    def _read(self, value: Any, start: int, end: int, beside: _Beside = _NOTHING, keyed: bool = False) -> None:
        """Walk through one decoded value (at most MAX_DEPTH deep).

        Args:
            value: the decoded value.
            start, end: the place of the whole JSON value in the text.
            beside: label and image of the object around the value.
            keyed: the value stands under "bbox_2d".
        """
        if isinstance(value, dict) and not keyed:
            label = value["label"] if isinstance(value.get("label"), str) else None
            # An object of several boxes may name their image once: {"image": 2, "boxes": [{…}, {…}]}.
            image = _image_number(value["image"]) if "image" in value else beside[1]
            for key, item in value.items():
                if key == "bbox_2d" or isinstance(item, dict | list):
                    self._read(item, start, end, (label, image), keyed=key == "bbox_2d")
        elif isinstance(value, list) and is_box(numbers := [_from_quotes(item) for item in value[:5]]):
            (self.keyed if keyed else self.bare).append(PlacedBox(ParsedBox(tuple(numbers), *beside), start, end))
        elif isinstance(value, list) and value and all(isinstance(item, dict | list) for item in value):
            for item in value:
                self._read(item, start, end, beside, keyed)
        elif keyed or (isinstance(value, list) and any(_is_number(item) for item in value)):
            self.num_bad += 1
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict | list):
                    self._read(item, start, end, beside)


def is_box(value: Any) -> bool:
    """Whether `value` is a list of four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    a, b, c, d = value  # without a loop: this is asked for every list of an answer
    if not (_is_number(a) and _is_number(b) and _is_number(c) and _is_number(d)):
        return False
    return math.isfinite(a) and math.isfinite(b) and math.isfinite(c) and math.isfinite(d)


def is_inside(place: int, spans: list[tuple[int, int]]) -> bool:
    """Whether one of the spans [start, end) contains `place`. The spans are sorted and do not overlap."""
    return span_around(place, spans) is not None


def span_around(place: int, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The span [start, end) that contains `place`, of sorted spans that do not overlap; None if none does."""
    before = bisect_right(spans, (place, math.inf)) - 1
    return spans[before] if before >= 0 and place < spans[before][1] else None


def decode(text: str, unique_keys: bool = True) -> Any:
    """Decode strict JSON, without NaN and Infinity. A number too large for a float becomes inf.

    The caller must bound the depth of `text`, because the decoder recurses.

    Raises:
        ValueError: `text` is not JSON, or an object has a key twice and `unique_keys` is set.
    """
    return (_UNIQUE if unique_keys else _REPEATED).decode(text)


def is_one_value(text: str) -> bool:
    """Whether `text` is a single bracket pair, at most MAX_DEPTH deep and with at most MAX_MARKS marks, JSON or not."""
    return _num_marks(text) <= MAX_MARKS and _outer_spans(text)[:1] == [(0, len(text))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _image_number(value: Any) -> int | None:
    """The whole number that a model wrote under "image", in quotes or not; None for anything else."""
    number = _from_quotes(value)
    return int(number) if _is_number(number) and abs(number) < 1e6 and number == int(number) else None


def _from_quotes(value: Any) -> Any:
    """The number in a JSON string; any other value is returned unchanged."""
    if not isinstance(value, str) or len(value) > 100:
        return value
    number = _QUOTED_NUMBER.fullmatch(_as_ascii(value))
    return value if number is None else float(number[1])


def _as_ascii(text: str) -> str:
    """The text with ASCII characters for full-width ones. Places in it are places in `text`."""
    # `translate` looks every character up, so that it gets only the runs that need it.
    return text if text.isascii() else _WIDE.sub(lambda run: run[0].translate(_FULL_WIDTH), text)


def _read_parts(text: str) -> list[tuple[int, int]]:
    """[start, end) of the parts of `text` that are read: all of it, or the beginning and around the last brackets."""
    if _num_marks(text) <= MAX_MARKS:
        return [(0, len(text))]
    # A quarter of the excerpt is before the last opening bracket, the rest is after it.
    start = max(text.rfind("["), text.rfind("{"), text.rfind("(")) - EXCERPT // 4
    if start <= EXCERPT // 2:
        return [(0, EXCERPT)]
    return [(0, EXCERPT // 2), (start, min(len(text), start + EXCERPT))]


def _num_marks(text: str) -> int:
    """Number of marks; for a text of at most MAX_MARKS characters an upper bound (its length)."""
    return len(text) if len(text) <= MAX_MARKS else sum(text.count(mark) for mark in _MARKS)


def _written(text: str, lenient: bool) -> Iterator[re.Match[str]]:
    """The boxes without JSON. A list in ASCII brackets is not one of them: it is read as JSON or not at all."""
    plain = text  # each character becomes one character, so that places in `plain` are places in `text`
    if not text.isascii() and len(text) <= 16 * EXCERPT:
        plain = _as_ascii(text)
    if "(" in plain or "<box>" in plain or plain != text:
        for found in (_LENIENT if lenient else _WRITTEN).finditer(plain):
            if text[found.start()] != "[":
                yield found


def _json_values(text: str) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of the outermost bracket pairs that decode as JSON, in order.

    If a pair cannot be decoded, the pairs inside it are tried. In total, at most MAX_VALUES pairs are tried.
    """
    done = 0  # end of the last value
    broken = -1  # where the last decoding failed: a pair around this place fails there too, unless it is repaired
    repairs = MAX_REPAIRS  # characters that may still be repaired
    for start, end in _outer_spans(text)[:MAX_VALUES]:
        if start < done:
            continue
        # A slice is decoded, not an offset into the text: the decoder's error counts all lines before its position,
        # which takes quadratic time over a long text.
        part, value = text[start:end], None
        if not start < broken < end:
            try:
                value = decode(part, unique_keys=False)
            except ValueError as error:
                broken = start + error.pos if isinstance(error, json.JSONDecodeError) else -1
        if value is None and ("," in part or "，" in part) and len(part) <= min(MAX_REPAIRED, repairs):
            repairs -= len(part)
            value = _repaired(part)
        if value is not None:
            done = end
            yield start, end, value


def _repaired(part: str) -> Any:
    """The value of a part that is broken only in the notation of boxes or in trailing commas, if it has a box; else
    None."""
    plain = _TRAILING_COMMA.sub(r"\1", _LIST.sub(_as_json, _as_ascii(part)))
    if plain == part:
        return None
    try:
        value = decode(plain, unique_keys=False)
    except ValueError:
        return None
    return value if BoxesInText("", False).read(value) else None


def _as_json(found: re.Match[str]) -> str:
    numbers = [float(number) for number in found.groups()]
    return repr(numbers) if is_box(numbers) else found[0]  # of finite floats, as JSON writes them


def _outer_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the balanced bracket pairs at most MAX_DEPTH deep, outer before inner, in order of start."""
    starts: list[int] = []  # place of every opening bracket
    ends: list[int | None] = []  # the place behind its closing bracket; None while open, or nested too deeply
    open_pairs: list[list[int]] = []  # stack of [index into starts, depth of the brackets inside]
    place = 0
    while match := (_INSIDE if open_pairs else _OPENING).search(text, place):
        start, place = match.span()
        token = text[start]
        if token == "{" or token == "[":
            open_pairs.append([len(starts), 1])
            starts.append(start)
            ends.append(None)
        elif token == "}" or token == "]":
            index, height = open_pairs.pop()
            if text[starts[index]] != ("{" if token == "}" else "["):
                open_pairs.clear()  # a closing bracket of the wrong kind: no open pair can be balanced any more
                continue
            if height <= MAX_DEPTH:
                ends[index] = place
            if open_pairs:
                open_pairs[-1][1] = max(open_pairs[-1][1], height + 1)
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end is not None]


# Integers are read as floats: int() refuses more than 4,300 digits, and needs quadratic time below that.
_UNIQUE = json.JSONDecoder(parse_int=float, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
_REPEATED = json.JSONDecoder(parse_int=float, parse_constant=refuse_constant)
