"""Image files for shards: their bytes as they are, after a look at the header."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.image_loading import ImageError, open_image
from datamodules.samples import LoadedSample, Sample, SampleError


def load_images(sample: Sample, image_root: Path) -> LoadedSample:
    """The sample with its files' bytes; nothing is decoded and nothing encoded again.

    Raises SampleError: "missing_image"; the rules of `open_image` ("unreadable_image": the header is no image's);
    "turned_image" (EXIF turns it when shown, and no source says in which of the two frames its boxes are);
    "image_size" (not the width and height that `extra["sizes"]`, the source's own, says its boxes are in).
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
        stored = open_image(data)
        found, orientation = list(stored.size), stored.orientation()
    except ImageError as error:
        raise SampleError(sample_id, error.rule, f"{path}: {error.detail}") from error
    if orientation != 1:
        raise SampleError(sample_id, "turned_image", f"{path} has EXIF orientation {orientation}")
    if size is not None and found != list(size):
        raise SampleError(sample_id, "image_size", f"{path} is {found}, the annotation says {list(size)}")
    return data
