"""Read image files for shards. The bytes are not changed; only the headers are checked."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from datamodules.images.image_files import Frame, Header, read_header, read_image_file
from datamodules.images.image_loading import ImageError
from datamodules.images.turned import turn_sample
from datamodules.samples.sample import LoadedSample, Sample, SampleError


def load_images(sample: Sample, image_root: Path, frame: Frame | None = None) -> LoadedSample:
    """The sample with the bytes of its image files. Nothing is decoded or encoded again.

    `frame` is the frame of the source's boxes, or None if it is unknown. For a photograph that EXIF rotates, boxes of
    stored pixels are converted to the image as shown; `extra["turned"]` counts these photographs.

    Raises SampleError: "missing_image"; the rules of `open_image` ("unreadable_image": the header is no image's);
    "turned_image" (EXIF rotates the image, and `frame` is None); "image_size" (its size differs from `extra["sizes"]`,
    the source's sizes of the annotated images).
    """
    # 1. The bytes of the files, and a check of each header.
    paths = [os.path.join(image_root, name) for name in sample.images]
    files = [read_image_file(path, sample.id) for path in paths]
    headers = read_headers(sample.id, paths, files, frame)
    # 2. The annotated sizes are compared in the frame of the boxes, and then stored for the image as shown.
    sizes = list(sample.extra.get("sizes", [None] * len(sample.images)))
    for index, header in enumerate(headers):
        if sizes[index] is not None:
            found = list(header.size_in(frame or "stored"))
            if found != list(sizes[index]):
                detail = f"{paths[index]} is {found}, the annotation says {sizes[index]}"
                raise SampleError(sample.id, "image_size", detail)
            sizes[index] = list(header.size_in("shown"))
    if "sizes" in sample.extra and any(header.orientation != 1 for header in headers):
        sample = replace(sample, extra={**sample.extra, "sizes": sizes})
    return turn_upright(LoadedSample(sample, tuple(files)), headers, frame)


def read_headers(
    sample_id: str, paths: Sequence[str], files: Sequence[bytes | BinaryIO], frame: Frame | None = None
) -> list[Header]:
    """The headers of a sample's image files.

    Args:
        sample_id: id of the sample, for the errors.
        paths: paths of the files, for the errors.
        files: their bytes, or the open files.
        frame: the frame of the boxes; None if it is unknown.

    Raises:
        SampleError: "turned_image" (EXIF rotates the image, and `frame` is None), or a rule of `open_image`.
    """
    headers = []
    for path, file in zip(paths, files, strict=True):
        try:
            header = read_header(io.BytesIO(file) if isinstance(file, bytes) else file)
        except ImageError as error:
            raise SampleError(sample_id, error.rule, f"{path}: {error.detail}") from error
        if header.orientation != 1 and frame is None:
            raise SampleError(sample_id, "turned_image", f"{path} has EXIF orientation {header.orientation}")
        headers.append(header)
    return headers


def turn_upright(loaded: LoadedSample, headers: Sequence[Header], frame: Frame | None) -> LoadedSample:
    """The sample; if `frame` is "stored", its boxes are converted to the images as shown."""
    # Orientation 1 is upright; 2 to 8 are EXIF's rotations and flips.
    turned = {index: header.orientation for index, header in enumerate(headers) if header.orientation != 1}
    if not turned or frame != "stored":
        return loaded
    sample = turn_sample(loaded.sample, turned)
    extra = {**sample.extra, "turned": f"{len(turned)} of {len(headers)}"}
    return LoadedSample(replace(sample, extra=extra), loaded.images)
