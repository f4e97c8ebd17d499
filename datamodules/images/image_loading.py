"""Open and decode images from untrusted bytes. Only this file does so (`tests/test_layout.py`).

An image is opened by its content, never by its file name, and only as one of `FORMATS`. `open_images` first reads the
headers of all images of a sample: format, size and value range are checked before any pixel is decoded. Then
`decode_images` decodes the images one after another. Every failure of a decoder becomes an `ImageError` or a
`SampleError` with one of these rules, under which a run counts it:

    unreadable_image     the header is not that of one of FORMATS
    decompression_bomb   the image has more pixels than one image may have
    too_many_pixels      the images of one sample together have more pixels than allowed
    unknown_value_range  32-bit or float values, or 16-bit values that use only a small part of their range
    extreme_aspect_ratio one side is more than 200 times the other
    truncated_image      the header is correct, but the pixels cannot be decoded

If the file is an animation or has several pages, only its first frame is decoded and used.
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

MAX_IMAGE_PIXELS = 64_000_000  # of one stored image; most cameras make images of 12 to 50 million pixels
MAX_SAMPLE_PIXELS = 256_000_000  # of all stored images of a sample: 4 of the largest, or 21 of 12 million pixels
MAX_ASPECT_RATIO = 200  # transformers' resizing function refuses a larger ratio

# The formats that users have. Pillow knows 40 more, but their decoders are rarely used and rarely tested, and the one
# for EPS runs the bytes as a program in Ghostscript.
FORMATS = (
    "JPEG",  # photographs of nearly every data set; Pillow's JPEG also reads MPO, the double pictures of phones
    "PNG",  # drawings, screenshots, the synthetic dataset; lossless copies
    "WEBP",  # pictures from web pages
    "GIF",  # older pictures from web pages
    "BMP",  # uncompressed pictures of tools and old data sets
    "TIFF",  # scans, microscopes, satellites
    "AVIF",  # newer pictures from web pages and phones
    "PPM",  # with PGM and PBM: older data sets of vision research
)

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 5 to 8 are turned by 90 degrees
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that can hold an orientation
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_LEAST_SHADES = 16  # of 256; an image that spans fewer after scaling would look like nearly one colour
_DETAIL = 200  # number of characters that are kept from a decoder's message


class ImageError(ValueError):
    """An image cannot be used; its sample is rejected under the name `rule`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(rule, detail)  # pickle calls __init__ with these: worker processes send the error
        self.rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image whose header has been read and whose pixels have not been decoded."""

    image: Image.Image
    # (width, height) as shown, as far as the header tells. A PNG can hold its EXIF behind the pixels; the true size of
    # such an image is known only after decoding.
    size: tuple[int, int]
    source: BinaryIO

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]

    def orientation(self) -> int:
        """EXIF's orientation, 1 (upright) to 8; 1 for a TIFF, because Pillow turns a TIFF while it decodes.

        Raises:
            ImageError: with the rule "unreadable_image".
        """
        with _decoding("unreadable_image"):
            if self.image.format != "PNG":
                return _header_orientation(self.image)
            # The EXIF of a PNG may stand behind the pixels. So a PNG with EXIF is decoded, and only such a PNG.
            self.source.seek(0)
            data = self.source.read()
            if not any(mark in data for mark in _PNG_MARKS):
                return 1
            return _exif_orientation(open_image(data).image)

    def decode(self) -> Image.Image:
        """The pixels as an upright RGB image. Transparent pixels become white; `_eight_bits` converts 16-bit grey.

        Raises:
            ImageError: with the rule "truncated_image" or "unknown_value_range".
        """
        # Another library in this process may have set this to True. Half an image would then pass as a whole one.
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
    """Read the header of an image, from its bytes or from an open file.

    Raises:
        ImageError: with the rule "unreadable_image", "decompression_bomb" (more pixels than `max_pixels`, or than
            Pillow's own limit) or "unknown_value_range".
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    # 1. Format and size.
    with _decoding("unreadable_image"):
        try:
            # Pillow may warn of a large image here. The warning is not silenced, because that would change the warning
            # filters of all threads.
            image = Image.open(source, formats=_known_formats())
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError("decompression_bomb", str(error)) from error
        except Image.UnidentifiedImageError as error:
            detail = f"not one of {', '.join(FORMATS)}; it begins with {_first_bytes(source)!r}"
            raise ImageError("unreadable_image", detail) from error
        size = image.size[::-1] if _header_orientation(image) >= 5 else image.size
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise ImageError("decompression_bomb", f"{size[0]}x{size[1]} pixels, max_image_pixels={max_pixels}")
    # 2. Value range: these formats do not define which value is white.
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "float" if image.mode == "F" else "32-bit or signed"
        raise ImageError("unknown_value_range", f"{kind} values: nothing says which is white. Save it as 8-bit")
    return StoredImage(image, size, source)


def _first_bytes(source: BinaryIO) -> bytes:
    source.seek(0)
    return source.read(12)


def load_image(data: bytes, max_pixels: int) -> Image.Image:
    """Open and decode one image.

    Raises:
        ImageError: with a rule of `open_image` or of `StoredImage.decode`.
    """
    return open_image(data, max_pixels).decode()


def open_images(
    loaded: LoadedSample, max_image_pixels: int = MAX_IMAGE_PIXELS, max_sample_pixels: int = MAX_SAMPLE_PIXELS
) -> list[StoredImage]:
    """Read the headers of a sample's images, in order. No pixel is decoded.

    Raises:
        SampleError: with a rule of `open_image`, or "missing_image", "extreme_aspect_ratio", or "too_many_pixels"
            (all images together have more than `max_sample_pixels` pixels).
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
    """Decode the images of a sample one by one, each when the caller takes it.

    A caller that keeps no image needs memory for the pixels of one image only.

    Raises:
        SampleError: with a rule of `StoredImage.decode`.
    """
    for index, stored in enumerate(images):
        with _of_sample(sample_id, index):
            image = stored.decode()
        stored.image.close()  # frees Pillow's own copy of the decoded pixels
        yield image
        del image  # or this frame would keep the image alive while the next one is decoded


@contextmanager
def _decoding(rule: str) -> Iterator[None]:
    """Convert any exception of a decoder into an ImageError of this rule.

    This is the only place that catches every exception, and here it is right. Pillow has about fifty decoders in Python
    and C. For a damaged file they raise many types: OSError, SyntaxError, RuntimeError (AVIF), struct.error, KeyError,
    OverflowError, … No list of types was ever complete, and each missing type ended a training run. Only calls of
    decoders stand inside this context, and each failure is counted by its rule. MemoryError is not converted: the size
    of an image is checked before, so this error says that the machine has no memory left.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(rule, f"{type(error).__name__}: {error}"[:_DETAIL]) from error


@contextmanager
def _of_sample(sample_id: str, index: int) -> Iterator[None]:
    """Convert an ImageError into a SampleError that names the sample and the image."""
    try:
        yield
    except ImageError as error:
        raise SampleError(sample_id, error.rule, f"image {index}: {error.detail}") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """The FORMATS that the installed Pillow can read: AVIF needs Pillow 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Image.open raises KeyError for an unknown name


def _header_orientation(image: Image.Image) -> int:
    """EXIF's orientation as far as the header tells. No pixel is decoded."""
    if image.format == "TIFF":
        return 1  # Pillow has exchanged width and height already
    if image.info.keys().isdisjoint(("exif", "xmp")):
        return 1  # `getexif` on every image would take as long as opening it
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to search EXIF behind them
    return _exif_orientation(image)


def _exif_orientation(image: Image.Image) -> int:
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1  # with any other value, Pillow shows the image as it is stored


def _eight_bits(stored: Image.Image, image: Image.Image) -> Image.Image:
    """Convert a grey image of up to 16 bits to 8-bit RGB.

    Black is 0. White is the largest value of the stored bits: 16 bits, or the number that a TIFF names. So each value
    keeps its highest 8 bits, as in Pillow's conversion of 16-bit colour. Transparent pixels of a PNG become white.

    Args:
        stored: the image before it was turned; it has the tags of a TIFF.
        image: the same image, decoded and upright.

    Raises:
        ImageError: with the rule "unknown_value_range". The image has several values, but they span fewer than 16 of
            the 256 shades. Then its values are not scaled to the stored bits (12 bits in a 16-bit file, for example),
            and nothing tells which value is white.
    """
    values = np.asarray(image)
    tags = getattr(stored, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if tags.get(_PHOTOMETRIC) == 0:  # a TIFF in which 0 is white
        values = 2**bits - 1 - values
    shades = (values >> (bits - 8)).astype(np.uint8)
    # An image with a single value has no detail that a wrong scale could hide.
    if values.min() != values.max() and int(shades.max()) - int(shades.min()) < _LEAST_SHADES:
        detail = f"{bits}-bit values of {values.min()} to {values.max()}: which is white? Save it as 8-bit"
        raise ImageError("unknown_value_range", detail)
    if "transparency" in stored.info:
        shades[np.asarray(image) == stored.info["transparency"]] = 255
    return Image.fromarray(shades).convert("RGB")
