"""Image files for shards: their bytes as they are, after a look at the header."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from datamodules.samples import LoadedSample, Sample, SampleError

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


def load_images(sample: Sample, image_root: Path) -> LoadedSample:
    """The sample with its files' bytes; nothing is decoded and nothing encoded again.

    Raises SampleError: "missing_image"; "unreadable_image" (the header is no image's); "turned_image" (EXIF turns it
    when shown, and no source says in which of the two frames its boxes are); "image_size" (not the width and height
    that `extra["sizes"]`, the source's own, says its boxes are in).
    """
    sizes = sample.extra.get("sizes", [None] * len(sample.images))
    files = zip(sample.images, sizes, strict=True)
    return LoadedSample(sample, tuple(_load(sample.id, os.path.join(image_root, name), size) for name, size in files))


def _load(sample_id: str, path: str, size: list[int] | None) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SampleError(sample_id, "missing_image", path) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            found, orientation = list(image.size), 1
            # Asking every JPEG would cost as much again as opening it.
            if image.format != "JPEG" or not image.info.keys().isdisjoint(("exif", "xmp")):
                orientation = image.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(sample_id, "unreadable_image", f"{path}: {error}") from error
    if orientation not in (0, 1):
        raise SampleError(sample_id, "turned_image", f"{path} has EXIF orientation {orientation}")
    if size is not None and found != list(size):
        raise SampleError(sample_id, "image_size", f"{path} is {found}, the annotation says {list(size)}")
    return data
