"""Image files by name: their bytes, and the facts in their headers. No pixel is needed here."""

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
from datamodules.samples.sample import SampleError

# The frame in which a source measured its boxes: the pixels as they lie in the file, or the image as EXIF's orientation
# shows it, which is also how this project shows every image to a model.
Frame = Literal["stored", "shown"]
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Names that no file can have.
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True)
class Header:
    """`size` is the stored (width, height) in pixels; `orientation` is EXIF's, 1 to 8.

    The stored size is the size of an image that is read without a look at EXIF. A TIFF's is the size as shown, since
    decoders turn a TIFF themselves.
    """

    size: tuple[int, int]
    orientation: int = 1

    def size_in(self, frame: Frame) -> tuple[int, int]:
        """(width, height) in this frame."""
        return self.size if frame == "stored" else turn_size(self.size, self.orientation)


def read_header(file: BinaryIO) -> Header:
    """The header of an image file. Raises ImageError, a ValueError, with the rules of `open_image`."""
    stored = open_image(file)
    return Header(stored.image.size, stored.orientation())


def refuse_turned(sample_id: str, name: str, data: bytes) -> None:
    """Raise SampleError "turned_image" for a photograph that EXIF turns. Bytes that are no image pass: their decoder
    refuses them."""
    try:
        orientation = read_header(io.BytesIO(data)).orientation
    except ValueError:
        return
    if orientation != 1:
        raise SampleError(sample_id, "turned_image", f"{name} has EXIF orientation {orientation}")


def read_image_file(path: str | Path, sample_id: str) -> bytes:
    """The file's bytes. Raises SampleError "missing_image" where no file has this name, or could (too long, a NUL).

    A file that is there and cannot be read (permissions, a broken disk) is no fault of the data: that OSError goes on.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        if not _is_absent(error):
            raise
        # A name that no file can have may be too long to print, or hold characters that cannot be printed.
        detail = str(path) if isinstance(error, _ABSENT) else f"{str(path)!r:.200}: {_reason(error)}"
        raise SampleError(sample_id, "missing_image", detail) from error


def file_size(path: str | Path) -> int | None:
    """Bytes of the file; None where `read_image_file` finds none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if not _is_absent(error):
            raise
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _is_absent(error: OSError | ValueError) -> bool:
    """Python raises ValueError for a NUL, or for a text that the file system's encoding cannot write."""
    return not isinstance(error, OSError) or isinstance(error, _ABSENT) or error.errno in _NO_NAME


def _reason(error: OSError | ValueError) -> str:
    """Without the name, which an OSError repeats in full."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
