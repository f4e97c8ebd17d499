"""JSON files larger than memory, read one array item at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"  # that some editors write before UTF-8
CHUNK = 1 << 20  # bytes read at a time
MAX_ITEM = 1 << 27  # bytes of one item; a broken file would else be read whole before it is called broken
LONGEST_CUT = 2  # characters after a number that may yet belong to it: "e-". More is something else, a fault
_BLANK = re.compile(r"[ \t\n\r]*")
_ENDS = frozenset(",:]} \t\n\r")  # what may follow a value
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Item:
    """`value`, which lies in bytes start to end of the file, under the top-level `key` ("" in a top-level list)."""

    key: str
    value: Any
    start: int
    end: int


def stream_json(path: str | Path) -> Iterator[Item]:
    """The items of a top-level list; of a top-level object, those of each array in it, and each other value whole.

    Memory holds one item and a few chunks. Raises ValueError, naming the byte, for a file that is not such JSON.
    """
    with Path(path).open("rb") as file:
        skipped = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(skipped)
        yield from _Stream(file, path, skipped).items()


class _Stream:
    """A window on the file, as latin-1: one character a byte, so that places in it are places in the file.

    JSON's own characters are ASCII, so the structure reads the same; a value with others is decoded again from bytes.
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
        # Anything behind the top-level value means a broken or joined file.
        if self.peek():
            raise self.fault("the end of the file")

    def members(self) -> Iterator[Item]:
        for _ in self.entries("}"):
            # A member: key, colon, then an array that is streamed or any other value whole.
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
        """Step over an opening bracket, stop at the beginning of each entry, and step over `closing`."""
        self.place += 1
        if self.peek() == closing:
            self.place += 1
            return
        yield
        while not self.separator(closing):
            yield

    def separator(self, closing: str) -> bool:
        """Step over a comma, or over `closing`, which ends the container: then True."""
        found = self.peek()
        if found not in (",", closing) or not found:
            raise self.fault(f"a comma or {closing}")
        self.place += 1
        return found == closing

    def peek(self) -> str:
        """The next character that is not blank, which `place` then points at; "" at the end of the file."""
        while True:
            self.place = _BLANK.match(self.text, self.place).end()
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]

    def value(self, key: str) -> Item:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
                # Else it may be a number that goes on behind the window's edge: "1", "1." of 1.5.
                whole = self.text[end : end + 1] in _ENDS or len(self.text) - end > LONGEST_CUT
                if whole or not self.more():
                    break
            except ValueError:  # broken, or cut by the window's edge
                if len(self.text) - self.place > MAX_ITEM or not self.more():
                    raise self.fault("a JSON value") from None
            except RecursionError:
                raise self.fault("a value of less depth") from None
        # The window is latin-1: a text with other characters was misread and is decoded again as UTF-8.
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
        """Widen the window by what it holds still unread, at least a chunk; False at the end of the file."""
        # Reading at least as much as is left doubles the window: a long item costs linear time, not quadratic.
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
