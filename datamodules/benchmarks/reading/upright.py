"""Convert boxes that refer to the stored pixels of photographs that EXIF rotates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.images.image_files import read_header
from datamodules.images.turned import boxed_images, turn_sample
from datamodules.samples.boxes import turn_size
from datamodules.samples.sample import BoxAnswer, Sample

TURNED = "kept: boxes of a turned photograph"


def turn_questions(samples: Sequence[Sample], folder: Path) -> tuple[list[Sample], int]:
    """Rotate the boxes of samples together with their images; returns the samples and the number of changed samples.

    The images are files below `folder`. Each image with a box is opened once. `extra["size"]` is the stored size of the
    answer's image, `extra["sizes"]` has the sizes of all images; they are rotated too. A missing or damaged image
    changes nothing here; its question is rejected when it is asked.
    """
    known: dict[str, int] = {}
    found = []
    for sample in samples:
        names = {index: sample.images[index] for index in boxed_images(sample)}
        for name in names.values():
            if name not in known:
                known[name] = orientation_of(folder / name)
        found.append(_turned(sample, {index: known[name] for index, name in names.items()}))
    return found, sum(new is not old for new, old in zip(found, samples, strict=True))


def orientation_of(path: Path) -> int:
    """EXIF's orientation of an image file, 1 to 8; 1 if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return read_header(file).orientation
    except (OSError, ValueError):
        return 1  # the code that later reads the file reports the error


def _turned(sample: Sample, orientations: dict[int, int]) -> Sample:
    new = turn_sample(sample, orientations)
    if new is sample:
        return sample
    if "size" in sample.extra and isinstance(sample.answer, BoxAnswer):
        size = turn_size(tuple(sample.extra["size"]), orientations[sample.answer.image])
        new = replace(new, extra={**sample.extra, "size": list(size)})
    if "sizes" in sample.extra:
        sizes = [list(turn_size(tuple(size), orientations.get(k, 1))) for k, size in enumerate(sample.extra["sizes"])]
        new = replace(new, extra={**sample.extra, "sizes": sizes})
    return new
