"""Image files by name: their bytes, and the facts in their headers. Pixels are not needed here."""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from datamodules.images.image_loading import open_image
from datamodules.samples.boxes import turn_size
from datamodules.samples.sample import LoadedSample, Sample, SampleError

# The image in which a data set measured its boxes. "stored": the pixels in the order of the file. "shown": the image
# turned by EXIF's orientation, as this project shows every image to a model.
Frame = Literal["stored", "shown"]
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Error codes for a name that no file can have.
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True)
class Header:
    """The facts in an image's header."""

    # (width, height) in pixels as stored, before EXIF turns the image. For a TIFF it is the size as shown, because
    # decoders turn a TIFF themselves.
    size: tuple[int, int]
    orientation: int = 1  # EXIF's value, 1 (upright) to 8

    def size_in(self, frame: Frame) -> tuple[int, int]:
        """(width, height) in pixels in this frame."""
        return self.size if frame == "stored" else turn_size(self.size, self.orientation)


def read_header(file: BinaryIO) -> Header:
    """The header of an image file.

    Raises:
        ImageError: a ValueError, with the rules of `open_image`.
    """
    stored = open_image(file)
    return Header(stored.image.size, stored.orientation())


def refuse_turned(sample_id: str, name: str, data: bytes) -> None:
    """Refuse a photograph that EXIF turns.

    Raises:
        SampleError: with the rule "turned_image".
    """
    try:
        orientation = read_header(io.BytesIO(data)).orientation
    except ValueError:
        return  # not an image: the encoder will reject these bytes by the right rule
    if orientation != 1:
        raise SampleError(sample_id, "turned_image", f"{name} has EXIF orientation {orientation}")


def read_image_file(path: str | Path, sample_id: str) -> bytes:
    """The bytes of a file.

    Raises:
        SampleError: with the rule "missing_image": no file has this name, or no file can have it (too long, a NUL).
        OSError: the file exists and cannot be read (permissions, a broken disk). That is not an error of the data.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        if not _is_absent(error):
            raise
        # A name that no file can have may be very long or unprintable, so its repr is printed and cut.
        detail = str(path) if isinstance(error, _ABSENT) else f"{str(path)!r:.200}: {_reason(error)}"
        raise SampleError(sample_id, "missing_image", detail) from error


def load_images(sample: Sample, image_root: str | Path) -> LoadedSample:
    """The sample with the bytes of its image files below `image_root`. Raises SampleError "missing_image"."""
    return LoadedSample(sample, tuple(read_image_file(Path(image_root, name), sample.id) for name in sample.images))


def file_size(path: str | Path) -> int | None:
    """Number of bytes of the file; None if `read_image_file` would not find it."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if not _is_absent(error):
            raise
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _is_absent(error: OSError | ValueError) -> bool:
    """Whether the error says that no file has this name."""
    # Python raises ValueError for a name with a NUL, and for text that the file system's encoding cannot express.
    return not isinstance(error, OSError) or isinstance(error, _ABSENT) or error.errno in _NO_NAME


def _reason(error: OSError | ValueError) -> str:
    """The text of the error, without the file name that str(OSError) would repeat in full."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
