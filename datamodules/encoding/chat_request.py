"""A loaded sample as chat messages of a model family, for a processor or for an OpenAI-compatible server.

The sizes of the images come with them: the answer's boxes are read in these sizes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from datamodules.encoding.messages import PromptStyle, build_messages
from datamodules.encoding.model_families import ModelFamily
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS, decode_images, open_images
from datamodules.samples.boxes import BoxFormat, ImageSizes, fit_size
from datamodules.samples.sample import ChoiceAnswer, LoadedSample


@dataclass(frozen=True)
class RequestForm:
    """How questions are put to a model that is not the policy of this repository.

    style: `think` and `answer` are this repository's suffixes, `plain` adds none, `native` is the model family's own.
    Under `native` a question with options asks for a letter as under `answer`, since families differ only in boxes.
    before_image: instead of the model family's, such as "Picture {}: ".
    min_pixels, max_pixels: bounds of an image as it is sent. For a model that speaks in pixels they must lie within
    its processor's own: the image then comes in the very size that the processor would give it, so that the pixels of
    prompt, answer and score are the same ones.
    """

    model_family: ModelFamily
    style: str = "native"
    before_image: str | None = None
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    max_image_pixels: int = MAX_IMAGE_PIXELS  # a larger stored image is refused (decompression bombs)
    max_sample_pixels: int = MAX_SAMPLE_PIXELS  # more in all stored images of a sample are refused

    def __post_init__(self) -> None:
        if self.style not in ("think", "answer", "plain", "native"):
            raise ValueError(f"style={self.style!r} is not think, answer, plain or native")
        try:
            (self.before_image or "").format(1)
        except (LookupError, ValueError) as error:
            raise ValueError(f'before_image={self.before_image!r} must be such as "Picture {{}}: "') from error
        if not 0 < self.min_pixels < self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must be in 1..max_pixels, max_pixels={self.max_pixels}")
        if self.model_family.box_format == BoxFormat.ABSOLUTE_PIXELS and self.model_family.factor is None:
            raise ValueError(f"model_family {self.model_family.name!r} speaks in pixels: it needs a factor")


@dataclass(frozen=True)
class ChatRequest:
    """Chat messages, and one sizes for each image."""

    messages: list[dict[str, Any]]
    image_sizes: tuple[ImageSizes, ...]


def build_request(loaded: LoadedSample, form: RequestForm) -> ChatRequest:
    """The turn in OpenAI's form, images as PNG data URLs. Raises SampleError as `build_turn` does."""
    request = build_turn(loaded, form)
    for message in request.messages:
        for part in message["content"]:
            if part["type"] == "image":
                part |= {"type": "image_url", "image_url": {"url": png_data_url(part.pop("image"))}}
    return request


def build_turn(loaded: LoadedSample, form: RequestForm) -> ChatRequest:
    """The turn in a processor's form, images as Pillow images under "image".

    Raises SampleError: the rules of `open_images` and `decode_images`.
    """
    sample, model_family = loaded.sample, form.model_family
    stored = open_images(loaded, form.max_image_pixels, form.max_sample_pixels)
    # `map` keeps no stored size while the next image is decoded.
    image_sizes, images = zip(*map(partial(_sent, form), decode_images(sample.id, stored)), strict=True)
    style, suffix = form.style, None
    if style == "native":
        chooses = isinstance(sample.answer, ChoiceAnswer)
        style, suffix = (PromptStyle.ANSWER, None) if chooses else (PromptStyle.PLAIN, model_family.suffix)
    turn = build_messages(
        sample,
        image_sizes,
        model_family.box_format,
        PromptStyle(style),
        suffix=suffix,
        question_box=model_family.question_box,
    )
    before = model_family.before_image if form.before_image is None else form.before_image
    for message in turn:
        message["content"] = _with_images(message["content"], images, before, model_family.after_image)
    return ChatRequest(turn, image_sizes)


def _with_images(
    content: list[dict[str, Any]], images: Sequence[Image.Image], before: str, after: str
) -> list[dict[str, Any]]:
    """The parts of one turn with each image placeholder replaced by its label and the image."""
    parts: list[dict[str, Any]] = []
    number = 0
    for part in content:
        if part["type"] != "image":
            parts.append(part)
            continue
        label = before.format(number + 1)
        parts += [{"type": "text", "text": label}] if label else []
        parts.append({"type": "image", "image": images[number]})
        parts += [{"type": "text", "text": after}] if after else []
        number += 1
    return parts


def _sent(form: RequestForm, image: Image.Image) -> tuple[ImageSizes, Image.Image]:
    """The image as it is sent, and its sizes."""
    sizes = ImageSizes(image.size, _sent_size(image.size, form))
    return sizes, _resized(image, sizes.resized)


def _sent_size(size: tuple[int, int], form: RequestForm) -> tuple[int, int]:
    if form.model_family.factor is not None:
        fitted = fit_size(size, form.model_family.factor, form.min_pixels, form.max_pixels)
        # The server fits it once more: what it gets must stay as it is, also where that takes slivers several rounds.
        return fitted if fitted == size else _sent_size(fitted, form)
    shrink = min(1.0, (form.max_pixels / (size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def png_data_url(image: Image.Image) -> str:
    """The image as a PNG in a URL: without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
