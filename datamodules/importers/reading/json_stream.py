"""Read JSON files larger than memory, one array item at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"  # some editors write it before UTF-8 text
CHUNK = 1 << 20  # bytes read at a time
# largest size of one item in bytes; without it, a broken file would be read completely before the error
MAX_ITEM = 1 << 27
LONGEST_CUT = 2  # number of characters after a number that may belong to it, such as "e-"; more characters are an error
_BLANK = re.compile(r"[ \t\n\r]*")
_ENDS = frozenset(",:]} \t\n\r")  # characters that may follow a value
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Item:
    """A value in the bytes `start` to `end` of the file. `key` is its top-level key ("" in a top-level list)."""

    key: str
    value: Any
    start: int
    end: int


def stream_json(path: str | Path) -> Iterator[Item]:
    """Yields the items of a top-level list.

    For a top-level object: the items of each array in it, and every other value.

    Memory holds one item and a few chunks. Raises ValueError that names the byte if the file is not such JSON.
    """
    with Path(path).open("rb") as file:
        skipped = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(skipped)
        yield from _Stream(file, path, skipped).items()


class _Stream:
    """A window on the file, decoded as latin-1. One character is one byte, so positions are positions in the file.

    The syntax of JSON is ASCII, so the structure is read correctly. A value with other characters is decoded again from
    its bytes.
    """

    def __init__(self, file: Any, path: str | Path, base: int = 0) -> None:
        self.file, self.path = file, path
        self.text, self.place, self.base, self.ended = "", 0, base, False

    def items(self) -> Iterator[Item]:
        opening = self.peek()
        if opening not in ("[", "{"):
            raise self.fault("a list or an object")
        if opening == "[":
            yield from self.array("")
        else:
            yield from self.members()
        # More content after the top-level value means that the file is broken or joined.
        if self.peek():
            raise self.fault("the end of the file")

    def members(self) -> Iterator[Item]:
        for _ in self.entries("}"):
            # A member: key, colon, and an array (streamed) or another value (read at once).
            key = self.value("").value
            if not isinstance(key, str) or self.peek() != ":":
                raise self.fault("a key and a colon")
            self.place += 1
            if self.peek() == "[":
                yield from self.array(key)
            else:
                yield self.value(key)

    def array(self, key: str) -> Iterator[Item]:
        for _ in self.entries("]"):
            yield self.value(key)

    def entries(self, closing: str) -> Iterator[None]:
        """Skip an opening bracket, stop at the beginning of each entry, and skip `closing`."""
        self.place += 1
        if self.peek() == closing:
            self.place += 1
            return
        yield
        while not self.separator(closing):
            yield

    def separator(self, closing: str) -> bool:
        """Skip a comma, or skip `closing`; returns True after `closing`."""
        found = self.peek()
        if found not in (",", closing) or not found:
            raise self.fault(f"a comma or {closing}")
        self.place += 1
        return found == closing

    def peek(self) -> str:
        """Move `place` to the next non-blank character and return it; "" at the end of the file."""
        while True:
            self.place = _BLANK.match(self.text, self.place).end()
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]

    def value(self, key: str) -> Item:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
                # Otherwise it may be a number that continues after the window, such as "1" or "1." of 1.5.
                whole = self.text[end : end + 1] in _ENDS or len(self.text) - end > LONGEST_CUT
                if whole or not self.more():
                    break
            except ValueError:  # broken, or cut at the end of the window
                if len(self.text) - self.place > MAX_ITEM or not self.more():
                    raise self.fault("a JSON value") from None
            except RecursionError:
                raise self.fault("a value of less depth") from None
        # The window is latin-1, so a text with other characters is decoded again as UTF-8.
        start, piece = self.place, self.text[self.place : end]
        if not piece.isascii():
            value = self.redecode(piece)
        self.place = end
        return Item(key, value, self.base + start, self.base + end)

    def redecode(self, piece: str) -> Any:
        try:
            return json.loads(piece.encode("latin-1").decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path}, byte {self.base + self.place}: not UTF-8: {error}") from error

    def more(self) -> bool:
        """Extend the window by its unread length, at least by one chunk; returns False at the end of the file."""
        # This doubles the window, so a long item needs linear time instead of quadratic time.
        rest = self.text[self.place :]
        read = b"" if self.ended else self.file.read(max(CHUNK, len(rest)))
        self.ended = not read
        if read:
            self.base += self.place
            self.text, self.place = rest + read.decode("latin-1"), 0
        return bool(read)

    def fault(self, expected: str) -> ValueError:
        found = self.text[self.place : self.place + 40]
        return ValueError(f"{self.path}, byte {self.base + self.place}: expected {expected}, found {found!r}")
