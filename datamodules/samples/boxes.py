"""All box arithmetic: IoU, validity, and `ImageSizes`, the one class that converts coordinates.

Boxes are (x1, y1, x2, y2), "xyxy", with continuous, end-exclusive edges. A "unit" box has coordinates from 0 to 1,
relative to the original image as it is shown (upright).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Box = tuple[float, float, float, float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes in the same coordinate space; a number from 0 to 1, never NaN.

    The area of a box is (x2-x1)(y2-y1), without the +1 of integer pixel boxes. A degenerate, inverted or non-finite box
    has no area, so its IoU with any box is 0.0.
    """
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    # NaN is above nothing, so that no comparison with it is true.
    if not (ax2 > ax1 and ay2 > ay1 and bx2 > bx1 and by2 > by1):
        return 0.0
    if not (ax1 < bx2 and bx1 < ax2 and ay1 < by2 and by1 < ay2):  # most pairs do not overlap
        return 0.0
    area_a, area_b = (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)
    overlap = (min(ax2, bx2) - max(ax1, bx1)) * (min(ay2, by2) - max(ay1, by1))
    union = area_a + area_b - overlap
    # A tiny area can be rounded to 0. An infinite edge gives an infinite union, or NaN.
    if area_a == 0.0 or area_b == 0.0 or not math.isfinite(union):
        return 0.0
    return min(overlap / union, 1.0)  # rounding can make the quotient slightly larger than 1


def box_fault(box: Box) -> str | None:
    """None if `box` is a valid unit xyxy box, else the reason: "not_finite", "degenerate" or "out_of_range"."""
    if not all(math.isfinite(value) for value in box):
        return "not_finite"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "degenerate"
    if min(box) < 0.0 or max(box) > 1.0:
        return "out_of_range"
    return None


def from_pixels_xywh(values: Sequence[float], size: tuple[int, int]) -> tuple[Box, bool]:
    """Convert COCO's x, y, width, height in pixels to a unit xyxy box; the rest is as in `from_pixels_xyxy`."""
    x, y, width, height = values
    return from_pixels_xyxy((x, y, x + width, y + height), size)


def from_pixels_xyxy(edges: Sequence[float], size: tuple[int, int], tolerance: float = 1.0) -> tuple[Box, bool]:
    """Convert xyxy in pixels to a unit xyxy box; also returns whether an edge was moved onto the border of the image.

    Args:
        edges: x1, y1, x2, y2 in pixels.
        size: (width, height) of the image in pixels.
        tolerance: in pixels. An edge that lies outside by at most this is moved onto the border. An edge farther
            outside stays where it is, and `box_fault` reports it.
    """
    edges, limits = tuple(edges), (*size, *size)
    clamped = []
    for edge, limit in zip(edges, limits, strict=True):
        # The tools of annotators round, so an edge may lie slightly outside.
        near = -tolerance <= edge < 0 or limit < edge <= limit + tolerance
        clamped.append(min(max(edge, 0.0), float(limit)) if near else edge)
    x1, y1, x2, y2 = (edge / limit for edge, limit in zip(clamped, limits, strict=True))
    return (x1, y1, x2, y2), tuple(clamped) != edges


def from_pixels_clipped(box: Sequence[float], size: Sequence[int]) -> list[float]:
    """Convert an xyxy box in pixels of an image of `size` (width, height) to a unit xyxy box, clipped to the image.

    An inverted box stays inverted. Benchmarks use this, because every question of a benchmark counts. Training data
    uses `from_pixels_xywh`, which accepts only small rounding errors.

    Raises:
        ValueError: `box` does not have four numbers, or a size is below 1.
    """
    sizes = (*size, *size)
    if len(box) != 4 or min(sizes) < 1:
        raise ValueError(f"box={list(box)} of an image of size={list(size)}: four numbers and positive sizes needed")
    return [min(max(value / total, 0.0), 1.0) for value, total in zip(box, sizes, strict=True)]


def turn_box(box: Box, orientation: int) -> Box:
    """Turn a unit xyxy box of the stored pixels into a unit xyxy box of the image as it is shown.

    `orientation` is EXIF's value, 1 to 8 (Exif 2.3, tag 274). An inverted box stays inverted.
    """
    x1, y1, x2, y2 = box
    # 5 to 8 exchange the two axes first. Then 2, 3, 6, 7 mirror left and right; 3, 4, 7, 8 mirror top and bottom.
    if orientation >= 5:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (2, 3, 6, 7):
        x1, x2 = 1 - x2, 1 - x1
    if orientation in (3, 4, 7, 8):
        y1, y2 = 1 - y2, 1 - y1
    return x1, y1, x2, y2


def turn_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The (width, height) of an image as EXIF's `orientation` shows it, from its stored (width, height)."""
    return (size[1], size[0]) if orientation >= 5 else size


def is_unit_xywh(values: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether x, y, width and height are numbers from 0 to 1 although the data set says pixels.

    In pixels, such a box would be within the first two rows and columns of the image, which is not plausible. Images
    with sides of at most two pixels are an exception. A box without an area returns False: `box_fault` reports it.
    """
    return max(values) <= 1 and min(values[2:]) > 0 and min(size) > 2


class BoxFormat(StrEnum):
    """The meaning of the numbers that a model writes: a property of the model, never guessed from the numbers."""

    ABSOLUTE_PIXELS = "absolute_pixels"  # pixels of the resized image (Qwen2.5-VL)
    RELATIVE_1000 = "relative_1000"  # 0-1000 of the image (Qwen2-VL, InternVL, Migician)
    NORMALIZED = "normalized"  # 0-1 of the image

    @classmethod
    def _missing_(cls, value: object) -> BoxFormat | None:
        """Accept the names of earlier versions as aliases."""
        old = {"absolute": cls.ABSOLUTE_PIXELS, "per_mille": cls.RELATIVE_1000, "unit": cls.NORMALIZED}
        return old.get(value) if isinstance(value, str) else None


# The values that a command line or a YAML file may hold; `BoxFormat(name)` accepts each of them.
BoxFormatName = Literal["absolute_pixels", "relative_1000", "normalized", "absolute", "per_mille", "unit"]


@dataclass(frozen=True)
class ImageSizes:
    """The two sizes of one image, (width, height) in pixels: as stored, and as resized for the vision tower.

    Only this class converts between a unit box and the numbers that a model reads and writes:

        sizes = ImageSizes(original=(640, 480), resized=(644, 476))
        sizes.to_model((0.25, 0.5, 0.75, 1.0), BoxFormat.ABSOLUTE_PIXELS)   # (161, 238, 483, 475)
    """

    original: tuple[int, int]
    resized: tuple[int, int]

    def __post_init__(self) -> None:
        if min(*self.original, *self.resized) < 1:
            raise ValueError(f"image sizes must be at least 1: original={self.original}, resized={self.resized}")

    @classmethod
    def from_grid(cls, original: tuple[int, int], grid_hw: tuple[int, int], patch_size: int) -> ImageSizes:
        """Make the sizes from a processor's patch grid.

        Args:
            original: (width, height) in pixels.
            grid_hw: `image_grid_thw[k][1:]` of the processor: rows and columns of patches.
            patch_size: side of a patch in pixels.
        """
        rows, columns = grid_hw
        return cls(original=original, resized=(columns * patch_size, rows * patch_size))

    def to_model(self, box: Box, box_format: BoxFormat) -> tuple[int | float, ...]:
        """The four numbers that a model of this box format writes for the unit xyxy box `box`."""
        # Rounding and clipping follow the models' own training data: pixels to 0..size-1, relative to 0..1000.
        if box_format == BoxFormat.NORMALIZED:
            return tuple(round(value, 3) for value in box)
        if box_format == BoxFormat.RELATIVE_1000:
            return tuple(_clip(round(value * 1000), 1000) for value in box)
        sizes = (*self.resized, *self.resized)
        return tuple(_clip(round(value * size), size - 1) for value, size in zip(box, sizes, strict=True))

    def to_unit(self, values: Sequence[float], box_format: BoxFormat) -> Box:
        """The unit xyxy box of four numbers that a model wrote.

        Nothing is clipped or reordered: an inverted box stays inverted and scores 0.
        """
        x1, y1, x2, y2 = values
        width, height = {
            BoxFormat.ABSOLUTE_PIXELS: self.resized,
            BoxFormat.RELATIVE_1000: (1000, 1000),
            BoxFormat.NORMALIZED: (1, 1),
        }[box_format]
        return x1 / width, y1 / height, x2 / width, y2 / height

    def to_pixels(self, box: Box) -> Box:
        """The unit xyxy box in pixels of the original image, for drawing."""
        width, height = self.original
        return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def image_sizes_to_json(image_sizes: Sequence[ImageSizes]) -> list[list[int]]:
    """[[width, height, resized width, resized height], …], the form in journals and in files of predictions."""
    return [[*sizes.original, *sizes.resized] for sizes in image_sizes]


def image_sizes_from_json(sizes: Sequence[Sequence[int]]) -> tuple[ImageSizes, ...]:
    """The inverse of `image_sizes_to_json`."""
    return tuple(ImageSizes(original=(w, h), resized=(pw, ph)) for w, h, pw, ph in sizes)


def fit_size(size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (width, height) to which Qwen's processors resize an image, with nearly the same aspect ratio.

    Source: `smart_resize` of Qwen2-VL, with at least one `factor` per side as in qwen_vl_utils. The result equals that
    of transformers for sides of at least 28 pixels and aspect ratios up to 4:1. A size that fits already is returned
    unchanged. A very long and narrow image can come out larger than `max_pixels`; a second call shrinks it further.

    Args:
        size: (width, height) of the image in pixels.
        factor: both sides become multiples of this (patch size times merge size, 28 for Qwen2.5-VL).
        min_pixels: smallest area in pixels.
        max_pixels: largest area in pixels.
    """
    width, height = size
    # Each side to the nearest multiple. Only an area outside the limits needs a common scale for both sides.
    new = [max(factor, round(side / factor) * factor) for side in size]
    if new[0] * new[1] > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        new = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
    elif new[0] * new[1] < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        new = [math.ceil(side * grow / factor) * factor for side in size]
    return new[0], new[1]


def _clip(value: int, highest: int) -> int:
    return max(0, min(value, highest))
