"""Convert the numbers of a box from the box format that the user or the record's format states.

Contradictions are reported, never repaired.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from datamodules.importers.own_data.statement import COORDINATES, Coordinates
from datamodules.importers.reading.source import DataError
from datamodules.samples.boxes import Box, box_fault, fit_size, from_pixels_xyxy
from datamodules.samples.sample import SampleError

PATCH = 28  # Qwen2.5-VL's resizing makes each side a multiple of this number of pixels
ROUNDING = 1e-6  # rounding error of sums such as x + width, relative to the image
NUM_EXAMPLES = 3
Size = tuple[int, int]  # (width, height) in pixels, in the frame of the boxes
Limits = Sequence[int] | None  # [min_pixels, max_pixels] of the resizing


class Written(NamedTuple):
    """A box as written in a record, for the check of a whole file."""

    values: tuple[float, ...]
    size: Size
    place: str  # the record, for messages


def read_numbers(values: Any, sample_id: str) -> tuple[float, float, float, float]:
    """The four numbers of a box as floats. A number beyond the range of floats becomes infinite.

    Raises:
        SampleError: "box_length" or "field_type": these are not four numbers.
    """
    if not isinstance(values, list | tuple):
        raise SampleError(sample_id, "field_type", f"a box is a list of four numbers, got {values!r:.100}")
    if len(values) != 4:
        raise SampleError(sample_id, "box_length", f"a box has four numbers, got {len(values)}: {values!r:.100}")
    # bool is a subclass of int, but JSON's true is not a coordinate.
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in values):
        raise SampleError(sample_id, "field_type", f"a box is a list of four numbers, got {values!r:.100}")
    return tuple(map(_to_float, values))


def to_unit(
    values: Sequence[float], coordinates: Coordinates, size: Size, limits: Limits, sample_id: str
) -> tuple[Box, bool]:
    """Convert four numbers to a unit xyxy box; also returns whether an edge was moved onto the border of the image.

    An edge is moved only if it is outside by no more than a rounding error.

    Args:
        values: the four numbers.
        coordinates: their box format.
        size: (width, height) of the image in pixels.
        limits: limits of the resizing, for resized pixels.
        sample_id: for the error.

    Raises:
        SampleError: "box_in_unit" for numbers in 0-1 if another box format is stated; "not_finite_box",
            "degenerate_box" or "out_of_range_box".
    """
    if fault := misfit(values, coordinates, size, limits):
        canvas = "x".join(map(str, _canvas(coordinates, size, limits)[0]))
        detail = f"{list(values)} as {coordinates} of an image of {size[0]}x{size[1]} (0 to {canvas})"
        raise SampleError(sample_id, fault, detail)
    return _convert(values, coordinates, size, limits)


def misfit(values: Sequence[float], coordinates: Coordinates, size: Size, limits: Limits) -> str | None:
    """The rule that the box breaks in this box format; None if the box is possible in it."""
    if not all(map(math.isfinite, values)):
        return "not_finite_box"
    # NaN and infinity are excluded above, because the comparisons below would not detect them.
    canvas, _ = _canvas(coordinates, size, limits)
    box, _ = _convert(values, coordinates, size, limits)
    # In a format with many units, such a box would be in the first two rows and columns.
    if min(canvas) > 2 and max(values) <= 1 and box_fault(box) is None:
        return "box_in_unit"
    return f"{fault}_box" if (fault := box_fault(box)) else None


def count_fits(boxes: Iterable[Written], limits: Limits) -> dict[str, int]:
    """The number of boxes that fit each box format. Resized pixels are counted only if their limits are known."""
    counts: Counter[str] = Counter({name: 0 for name in COORDINATES if name != "resized_pixels" or limits})
    for box in boxes:
        counts.update(name for name in counts if misfit(box.values, name, box.size, limits) is None)
    return dict(counts)


def refuse_misfits(
    where: str,
    boxes: Sequence[Written],
    coordinates: Coordinates | None,
    limits: Limits,
    most: float,
) -> dict[str, int]:
    """Refuse a file whose boxes contradict the stated box format.

    Args:
        where: the file, for the message.
        boxes: the boxes of the file, or a random part of them.
        coordinates: the stated box format; None if there is no statement, which is an error if there are boxes.
        limits: of the resizing, for resized pixels.
        most: the allowed share of contradicting boxes; these are rejected one by one.

    Returns:
        {box format: number of boxes that are possible in it}.

    Raises:
        DataError: too many boxes contradict `coordinates`, or no box format is stated. The message has three examples
            and the formats that fit.
    """
    # 1. Count the boxes that fit each format. A small box fits several formats, so the counts only rank the formats.
    fits = count_fits(boxes, limits)
    best = max(fits.values())
    likely = [name for name, count in fits.items() if count == best > 0]
    # 2. No format is stated. It is never guessed from the counts; the user must state it.
    if coordinates is None:
        examples = "; ".join(map(_example, boxes[:NUM_EXAMPLES])) or "no image could be read"
        shares = ", ".join(f"{name} {count / max(len(boxes), 1):.0%}" for name, count in fits.items())
        raise DataError(
            f"{where}: nothing says what the numbers of a box mean. State it: --own.box_format=...\n"
            f"  boxes: {examples}\n"
            f"  each format fits this share of {len(boxes):,} boxes (several may fit): {shares}"
        )
    # 3. Compare the boxes with the stated format.
    wrong = [(box, rule) for box in boxes if (rule := misfit(box.values, coordinates, box.size, limits))]
    # In a small file, one or two wrong boxes are tolerated, unless all boxes are wrong.
    if len(wrong) <= most * len(boxes) or len(wrong) < min(NUM_EXAMPLES, len(boxes)):
        return fits
    # 4. The message: three examples, and the format that fits better, if one does.
    lines = [f"{where}: {len(wrong) / len(boxes):.0%} of {len(boxes):,} boxes cannot be {coordinates}:"]
    lines += [f"  {_example(box)}: {rule}" for box, rule in wrong[:NUM_EXAMPLES]]
    better = [name for name in likely if best > fits.get(coordinates, 0)]
    if better:
        # If several formats fit equally well, prefer those that differ from the stated one only in scale or only in
        # order.
        nearest = max(_likeness(name, coordinates) for name in better)
        better = [name for name in better if _likeness(name, coordinates) == nearest]
        cure = f"{' or '.join(better)} fits {best / len(boxes):.0%}: state --own.box_format={better[0]} if it is that"
    else:
        cure = "no format fits more of them: correct the file"
    raise DataError("\n".join([*lines, f"  {cure}, or admit more by --own.max_misfits"]))


def _likeness(one: str, other: str) -> int:
    """Number of properties (scale, order) in which two box formats agree: 0, 1 or 2."""
    same_order = one.endswith("_xywh") == other.endswith("_xywh")
    return (one.removesuffix("_xywh") == other.removesuffix("_xywh")) + same_order


def _example(box: Written) -> str:
    numbers = ", ".join(f"{value:g}" for value in box.values)
    return f"{box.place} [{numbers}] in {box.size[0]}x{box.size[1]}"


def _canvas(coordinates: Coordinates, size: Size, limits: Limits) -> tuple[Size, float]:
    """Returns the largest (x, y) of the box format, and how far outside an edge may be because of rounding."""
    # The size after Qwen2.5-VL's resizing, computed by the same function as in training.
    if coordinates == "resized_pixels":
        least, most = limits
        return fit_size(size, PATCH, least, most), 1.0
    if coordinates.startswith("pixels"):
        return size, 1.0
    # The tolerance is relative here, 1e-6 of the full range; with pixels it is one whole pixel.
    canvas = 1000 if coordinates.startswith("relative_1000") else 1
    return (canvas, canvas), canvas * ROUNDING


def _convert(values: Sequence[float], coordinates: Coordinates, size: Size, limits: Limits) -> tuple[Box, bool]:
    x1, y1, x2, y2 = values
    if coordinates.endswith("_xywh"):
        x2, y2 = x1 + x2, y1 + y2
    return from_pixels_xyxy((x1, y1, x2, y2), *_canvas(coordinates, size, limits))


def _to_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer outside the range of floats
        return math.inf
