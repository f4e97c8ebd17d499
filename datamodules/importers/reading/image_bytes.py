"""Image files for shards: their bytes as they are, after a look at the header."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

from datamodules.images.image_files import Frame, Header, read_header, read_image_file
from datamodules.images.image_loading import ImageError
from datamodules.images.turned import turn_sample
from datamodules.samples.sample import LoadedSample, Sample, SampleError


def load_images(sample: Sample, image_root: Path, frame: Frame | None = None) -> LoadedSample:
    """The sample with its files' bytes; nothing is decoded and nothing encoded again.

    `frame` is that in which the source measured its boxes, None where it is not known. Boxes of the stored pixels of a
    photograph that EXIF turns become boxes of the image as it is shown; `extra["turned"]` then says how often.

    Raises SampleError: "missing_image"; the rules of `open_image` ("unreadable_image": the header is no image's);
    "turned_image" (EXIF turns it when shown, and `frame` is None); "image_size" (not the width and height that
    `extra["sizes"]`, the source's own, says its boxes are in).
    """
    files, orientations = [], {}
    sizes = list(sample.extra.get("sizes", [None] * len(sample.images)))
    for index, name in enumerate(sample.images):
        path = os.path.join(image_root, name)
        data = read_image_file(path, sample.id)
        header = _header(sample.id, path, data)
        if header.orientation != 1 and frame is None:
            raise SampleError(sample.id, "turned_image", f"{path} has EXIF orientation {header.orientation}")
        found = list(header.size_in(frame or "stored"))
        if sizes[index] is not None:
            if found != list(sizes[index]):
                raise SampleError(sample.id, "image_size", f"{path} is {found}, the annotation says {sizes[index]}")
            sizes[index] = list(header.size_in("shown"))
        if frame == "stored" and header.orientation != 1:
            orientations[index] = header.orientation
        files.append(data)
    if orientations:
        extra = {**sample.extra, "turned": f"{len(orientations)} of {len(files)}"}
        extra |= {"sizes": sizes} if "sizes" in extra else {}
        sample = replace(turn_sample(sample, orientations), extra=extra)
    return LoadedSample(sample, tuple(files))


def _header(sample_id: str, path: str, data: bytes) -> Header:
    try:
        return read_header(io.BytesIO(data))
    except ImageError as error:
        raise SampleError(sample_id, error.rule, f"{path}: {error.detail}") from error
