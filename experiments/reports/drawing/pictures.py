"""Small copies of images as data URIs, for pages of one file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from datamodules.images.image_loading import MAX_IMAGE_PIXELS, load_image

SHARP = 256  # an image whose sides are not longer (in pixels) stays a PNG, so that drawings keep their edges


@dataclass(frozen=True)
class SmallCopy:
    """A copy of an image: its data URI, and the width and height of the original."""

    uri: str
    size: tuple[int, int]


def small_copy(data: bytes, longest_side: int) -> SmallCopy:
    """A copy with at most this many pixels a side. Raises ImageError for an image that cannot be read."""
    image = load_image(data, MAX_IMAGE_PIXELS)
    size = image.size
    image.thumbnail((longest_side, longest_side))
    kind = "PNG" if max(image.size) <= SHARP else "JPEG"
    file = io.BytesIO()
    image.save(file, kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return SmallCopy(data_uri(file.getvalue(), kind), size)


def data_uri(data: bytes, kind: str = "PNG") -> str:
    """The data URI of an encoded image: a picture inside the page. `kind` is its format, PNG or JPEG."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
