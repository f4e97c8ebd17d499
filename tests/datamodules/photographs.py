"""Photographs that EXIF turns, with coloured things whose places in the image as shown are found in its pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from datamodules.images.image_loading import load_image

SIZE = (120, 80)  # stored width, height
STORED = (5, 10, 35, 30)  # of the red thing, in stored pixels
QUERY = (60, 48, 108, 72)  # of a blue thing


def photograph(orientation: int, form: str = "JPEG") -> bytes:
    pixels = np.full((SIZE[1], SIZE[0], 3), 60, np.uint8)
    for (x1, y1, x2, y2), colour in ((STORED, (220, 30, 30)), (QUERY, (30, 30, 220))):
        pixels[y1:y2, x1:x2] = colour
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, form, quality=95, exif=exif.tobytes())
    return file.getvalue()


def place_of(data: bytes, colour: str = "red") -> tuple[float, float, float, float]:
    """Unit xyxy of the coloured thing in the image as a model is shown it, from its pixels alone."""
    return drawn_box(np.asarray(load_image(data, 10**7)), colour)


def drawn_box(pixels: np.ndarray, colour: str = "red") -> tuple[float, float, float, float]:
    channel = {"red": 0, "blue": 2}[colour]
    is_thing = pixels[..., channel].astype(int) - pixels[..., 2 - channel] > 80
    rows, columns = is_thing.any(axis=1).nonzero()[0], is_thing.any(axis=0).nonzero()[0]
    height, width = is_thing.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def unit(box: tuple[int, int, int, int] = STORED) -> list[float]:
    """The unit box in the stored frame."""
    return [value / size for value, size in zip(box, SIZE * 2, strict=True)]
