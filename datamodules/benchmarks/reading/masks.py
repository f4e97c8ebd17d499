"""Boxes from masks in COCO's run-length encoding. Boxes are pixel xyxy, end-exclusive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.samples.boxes import Box


def rle_box(rle: Mapping[str, Any]) -> Box | None:
    """The tight box of {"size": [height, width], "counts": str or list}; None for an empty mask.

    Counts are the lengths of alternating runs of 0 and 1, along the columns. The mask is not decoded. Raises ValueError
    if the runs do not fill the mask.
    """
    # Runs follow the columns: position p is in column p // height and row p % height.
    height, width = rle["size"]
    counts = rle["counts"]
    runs = counts if isinstance(counts, list) else _decode_counts(counts)
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"RLE: runs of {sum(runs)} pixels do not fill a mask of size {height}x{width}")
    left, top, right, bottom = width, height, 0, 0
    position = 0
    for index, run in enumerate(runs):
        # Runs with an odd index belong to the mask, the others to the background.
        if index % 2 and run:
            first, last = divmod(position, height), divmod(position + run - 1, height)
            left, right = min(left, first[0]), max(right, last[0] + 1)
            whole = first[0] != last[0]  # the run continues from the bottom of a column to the top of the next
            top = min(top, 0 if whole else first[1])
            bottom = max(bottom, height if whole else last[1] + 1)
        position += run
    return (float(left), float(top), float(right), float(bottom)) if right else None


def union_box(boxes: Sequence[Box | None]) -> Box | None:
    """The box around all boxes that are not None."""
    there = [box for box in boxes if box is not None]
    if not there:
        return None
    x1, y1, x2, y2 = zip(*there, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def _decode_counts(text: str | bytes) -> list[int]:
    """Decode COCO's compressed counts. A character holds five bits, offset by '0', low bits first.

    Its sixth bit means that more characters follow. Counts are signed. From the fourth count on, the difference to the
    second last count is stored.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text if isinstance(text, bytes) else text.encode("ascii"):
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError(f"RLE: counts hold the character {chr(code)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            # The last group's highest bit is the sign (two's complement over `shift` bits).
            if bits & 16:
                value -= 1 << shift
            # COCO stores differences between runs of the same kind, which are small for smooth outlines.
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("RLE: counts end inside a number")
    return counts


def encode_counts(runs: Sequence[int]) -> str:
    """The inverse, to write data in COCO's format."""
    text = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = not ((value == -1 and bits & 16) or (value == 0 and not bits & 16))
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)
