"""Images from bytes that somebody else wrote. Only this file opens and decodes them (`tests/test_layout.py`).

An image is opened by its content, never by its name, and only as one of `FORMATS`. First the headers of a sample's
images are read (`open_images`): format, size and value range are judged before any pixel is decoded. Then the images
are decoded one after another (`decode_images`). Every failure of a decoder is an `ImageError` or a `SampleError` with a
rule that runs count by:

    unreadable_image     not the header of one of FORMATS
    decompression_bomb   more pixels than one image may have
    too_many_pixels      more pixels than the images of one sample may have together
    unknown_value_range  32-bit or float values, or 16-bit values that use only a small part of their range
    extreme_aspect_ratio one side is more than 200 times the other
    truncated_image      the header is good, the pixels cannot be decoded

An animation or a file of several pages counts with its first frame, and no other frame is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps

from datamodules.samples.sample import LoadedSample, SampleError

MAX_IMAGE_PIXELS = 64_000_000  # of one stored image; most cameras make 12 to 50 million
MAX_SAMPLE_PIXELS = 256_000_000  # of all stored images of a sample: 4 of the largest, or 21 of 12 million
MAX_ASPECT_RATIO = 200  # transformers' resizing rule refuses more

# The formats that users have. Pillow knows 40 more. Their decoders are rarely used and rarely tested, and that of EPS
# runs the bytes as a program in Ghostscript.
FORMATS = (
    "JPEG",  # photographs of nearly every data set; Pillow reads MPO with it, the two pictures of a phone's camera
    "PNG",  # drawings, screenshots, the nano world; lossless copies
    "WEBP",  # pictures from web pages
    "GIF",  # older pictures from web pages
    "BMP",  # uncompressed pictures of tools and old data sets
    "TIFF",  # scans, microscopes, satellites
    "AVIF",  # newer pictures from web pages and phones
    "PPM",  # with PGM and PBM: older data sets of vision research
)

_ORIENTATION = 0x0112  # tag of EXIF; 1 is upright, 5 to 8 are turned by a quarter
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that can hold an orientation
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_LEAST_SHADES = 16  # of 256; an image that spans fewer after scaling would be shown as nearly one colour
_DETAIL = 200  # characters kept of a decoder's message


class ImageError(ValueError):
    """An image that cannot be used; `rule` is the name that its sample is rejected under."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(rule, detail)  # both, so that workers can pickle it
        self.rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image whose header is read and whose pixels are not.

    size: (width, height) as it will be shown, as far as its header says. A PNG can hold the EXIF that turns it behind
    its pixels: then the size is known only after decoding.
    """

    image: Image.Image
    size: tuple[int, int]
    source: BinaryIO

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]

    def orientation(self) -> int:
        """EXIF's orientation, 1 (upright) to 8; 1 for a TIFF, which Pillow turns while it decodes.

        A PNG that holds EXIF is decoded for it, as EXIF may stand behind the pixels. Raises ImageError
        ("unreadable_image").
        """
        with _decoding("unreadable_image"):
            if self.image.format != "PNG":
                return _header_orientation(self.image)
            self.source.seek(0)
            data = self.source.read()
            if not any(mark in data for mark in _PNG_MARKS):
                return 1
            return _exif_orientation(open_image(data).image)

    def decode(self) -> Image.Image:
        """The pixels as RGB, upright (EXIF), transparency over white; grey of 16 bits as `_eight_bits` says.

        Raises ImageError ("truncated_image", "unknown_value_range").
        """
        # Another library in this process may have switched it on: half an image would then pass for a whole one.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with _decoding("truncated_image"):
            self.image.load()
            image = ImageOps.exif_transpose(self.image)
            if image.mode.startswith("I"):
                return _eight_bits(self.image, image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")


def open_image(data: bytes | BinaryIO, max_pixels: int | None = None) -> StoredImage:
    """Read an image's header, of bytes or of an open file.

    Raises ImageError: "unreadable_image", "decompression_bomb" (more than `max_pixels` pixels, or than Pillow's own
    limit) or "unknown_value_range".
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with _decoding("unreadable_image"):
        try:
            # Pillow warns of large images, and is let: silencing it for a moment would change the filters of all
            # threads.
            image = Image.open(source, formats=_known_formats())
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError("decompression_bomb", str(error)) from error
        except Image.UnidentifiedImageError as error:
            detail = f"not one of {', '.join(FORMATS)}; it begins with {_first_bytes(source)!r}"
            raise ImageError("unreadable_image", detail) from error
        size = image.size[::-1] if _header_orientation(image) >= 5 else image.size
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise ImageError("decompression_bomb", f"{size[0]}x{size[1]} pixels, max_image_pixels={max_pixels}")
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "float" if image.mode == "F" else "32-bit or signed"
        raise ImageError("unknown_value_range", f"{kind} values: nothing says which is white. Save it as 8-bit")
    return StoredImage(image, size, source)


def _first_bytes(source: BinaryIO) -> bytes:
    source.seek(0)
    return source.read(12)


def load_image(data: bytes, max_pixels: int) -> Image.Image:
    """Open and decode. Raises ImageError: the rules of `open_image` and of `StoredImage.decode`."""
    return open_image(data, max_pixels).decode()


def open_images(
    loaded: LoadedSample, max_image_pixels: int = MAX_IMAGE_PIXELS, max_sample_pixels: int = MAX_SAMPLE_PIXELS
) -> list[StoredImage]:
    """The headers of a sample's images, in order; no pixel is decoded.

    Raises SampleError: the rules of `open_image`, "missing_image", "extreme_aspect_ratio" and "too_many_pixels" (more
    than `max_sample_pixels` in all images together).
    """
    sample = loaded.sample
    if len(loaded.images) != len(sample.images):
        raise SampleError(sample.id, "missing_image", f"{len(loaded.images)} of {len(sample.images)} images")
    images = []
    for index, data in enumerate(loaded.images):
        with _of_sample(sample.id, index):
            images.append(open_image(data, max_image_pixels))
        width, height = images[-1].size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise SampleError(sample.id, "extreme_aspect_ratio", f"image {index} is {width}x{height}")
    pixels = sum(image.pixels for image in images)
    if pixels > max_sample_pixels:
        detail = f"{pixels} pixels in {len(images)} images, max_sample_pixels={max_sample_pixels}"
        raise SampleError(sample.id, "too_many_pixels", detail)
    return images


def decode_images(sample_id: str, images: Sequence[StoredImage]) -> Iterator[Image.Image]:
    """Each image as `StoredImage.decode` gives it, decoded when it is asked for.

    A caller that keeps no image holds the pixels of one image at a time. Raises SampleError with the rules of `decode`.
    """
    for index, stored in enumerate(images):
        with _of_sample(sample_id, index):
            image = stored.decode()
        stored.image.close()  # its decoded copy, of which Pillow would hold on to the pixels
        yield image
        del image


@contextmanager
def _decoding(rule: str) -> Iterator[None]:
    """Any exception of a decoder as an ImageError of this rule.

    Catching broadly is right here, and only here. Decoders are fifty pieces of Python and C that raise whatever a
    damaged file leads them to: OSError, SyntaxError, RuntimeError (AVIF), struct.error, KeyError, OverflowError, … No
    list of types was ever complete, and each type that it lacked ended a training run. Under this context stands the
    call of the decoder alone, and the failure is counted by its rule. MemoryError is raised on: sizes are bounded
    before, so it says that the machine has no memory left and nothing about the image.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(rule, f"{type(error).__name__}: {error}"[:_DETAIL]) from error


@contextmanager
def _of_sample(sample_id: str, index: int) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise SampleError(sample_id, error.rule, f"image {index}: {error.detail}") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """FORMATS that this Pillow can read: AVIF came with 11.3. Pillow raises KeyError for a name that it lacks."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _header_orientation(image: Image.Image) -> int:
    """EXIF's orientation, as far as the header says; nothing is decoded."""
    if image.format == "TIFF":
        return 1  # Pillow has exchanged width and height already
    if image.info.keys().isdisjoint(("exif", "xmp")):
        return 1  # asking every image would cost as much again as opening it
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to look for EXIF behind them
    return _exif_orientation(image)


def _exif_orientation(image: Image.Image) -> int:
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1  # Pillow shows an image of any other value as it is stored


def _eight_bits(stored: Image.Image, image: Image.Image) -> Image.Image:
    """`image`, grey of up to 16 bits as it was decoded from `stored`, as RGB.

    Rule: black is 0 and white the largest value of the stored bits (16, or what a TIFF says), so each value becomes its
    highest 8 bits, as Pillow does with 16-bit colour. A TIFF whose white is 0 is inverted. The value that a PNG calls
    transparent becomes white. An image that is not of one value, but spans fewer than 16 of the 256 shades, is refused
    ("unknown_value_range"): its values are not scaled to the stored bits (as 12 bits in a 16-bit file), so nothing says
    which is white.
    """
    values = np.asarray(image)
    tags = getattr(stored, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if tags.get(_PHOTOMETRIC) == 0:
        values = 2**bits - 1 - values
    shades = (values >> (bits - 8)).astype(np.uint8)
    if values.min() != values.max() and int(shades.max()) - int(shades.min()) < _LEAST_SHADES:
        detail = f"{bits}-bit values of {values.min()} to {values.max()}: which is white? Save it as 8-bit"
        raise ImageError("unknown_value_range", detail)
    if "transparency" in stored.info:
        shades[np.asarray(image) == stored.info["transparency"]] = 255
    return Image.fromarray(shades).convert("RGB")
