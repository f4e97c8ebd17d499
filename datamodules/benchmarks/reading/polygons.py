"""Draw masks from labelme's polygons with OpenCV, as LISA does for ReasonSeg. Only this file imports OpenCV.

Libraries disagree about the covered pixels if a polygon leaves the image, crosses itself or has an edge between two
pixels. With Pillow, the same polygons give other boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from datamodules.samples.boxes import Box

Polygon = Sequence[Sequence[float]]
LARGEST = 2**31 - 1  # OpenCV uses 32-bit coordinates


def draw_mask(polygons: Sequence[tuple[Polygon, int]], size: tuple[int, int]) -> np.ndarray:
    """Draw (polygon, value) pairs into an image of zeros with `size` (width, height); returns uint8 [height, width].

    Outline and area are drawn. Larger polygons are drawn first, so that smaller ones overwrite them. Coordinates are
    pixels; their fractions are cut off. Source: `get_mask_from_json` of LISA's utils/data_processing.py.
    """
    width, height = size
    areas = []
    for points, _ in polygons:
        alone = np.zeros((height, width), np.uint8)
        _draw(alone, points, 1)
        areas.append(alone.sum())
    mask = np.zeros((height, width), np.uint8)
    # The same call as in the source, so that polygons of equal area have the same order too.
    for index in np.argsort(areas)[::-1].astype(int):
        _draw(mask, *polygons[index])
    return mask


def polygons_box(polygons: Sequence[tuple[Polygon, int]], size: tuple[int, int]) -> Box | None:
    """The tight box, pixel xyxy and end-exclusive, of the pixels of value 1 in `draw_mask`; None if there are none."""
    is_target = draw_mask(polygons, size) == 1
    rows, columns = is_target.any(axis=1).nonzero()[0], is_target.any(axis=0).nonzero()[0]
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def points_fault(points: object) -> str | None:
    """The reason why `points` cannot be drawn as a polygon, or None."""
    if not isinstance(points, list) or not points:
        return "is not a list of points"
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            return f"holds {point!r:.80}, not [x, y]"
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in point):
            return f"holds {point!r:.80}, not two numbers"
        if not all(math.isfinite(value) and abs(value) <= LARGEST for value in point):
            return f"holds {point!r:.80}, which no image has"
    return None


def _draw(mask: np.ndarray, points: Polygon, value: int) -> None:
    cv2 = _library()
    # int32 cuts the fraction off towards 0, as LISA's code does. The outline is drawn too: it adds a pixel at the edge.
    corners = np.array([points], dtype=np.int32)
    cv2.polylines(mask, corners, True, value, 1)
    cv2.fillPoly(mask, corners, value)


def _library() -> ModuleType:
    try:
        import cv2
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        raise ValueError(
            "OpenCV is missing, by whose rules ReasonSeg's masks are drawn: pip install -e '.[benchmarks]'"
        ) from error
    return cv2
