"""Turn a loaded sample into chat messages for a model family, for a processor or for an OpenAI-compatible server.

The result also has the sizes of the images. The boxes in the model's answer are converted with these sizes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import Image

from datamodules.encoding.messages import PromptStyle, build_messages
from datamodules.encoding.model_families import ModelFamily
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS, decode_images, open_images
from datamodules.persistence.problems import Problems
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat, ImageSizes, fit_size
from datamodules.samples.sample import BoxesAnswer, ChoiceAnswer, LoadedSample


@dataclass(frozen=True)
class RequestForm:
    """The form of the questions for a model that is not the policy of this project.

    Args:
        model_family: its box format, and its own prompt suffix and image labels.
        style: the text after the question. "think" and "answer" are this project's suffixes, "plain" adds none, and
            "native" is the model family's own suffix. With "native", a question with options, or with several boxes as
            its answer, asks as with "answer": families differ only in how they write one box.
        before_image: the label before each image, such as "Picture {}: "; None takes that of the model family.
        min_pixels: smallest area of an image as it is sent, in pixels.
        max_pixels: largest area of an image as it is sent. For a model that writes boxes in pixels, both limits must
            lie within those of its processor. Then the image is sent in the size that the processor would give it, so
            the pixels of prompt, answer and score agree.
        max_image_pixels: a stored image with more pixels is refused (decompression bomb).
        max_sample_pixels: a sample whose stored images together have more pixels is refused.
        answer_form: what the styles "think" and "answer" ask for.
    """

    model_family: ModelFamily
    style: str = "native"
    before_image: str | None = None
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_sample_pixels: int = MAX_SAMPLE_PIXELS
    answer_form: AnswerForm = AnswerForm.ONE_BOX

    def __post_init__(self) -> None:
        problems, family = Problems(), self.model_family
        problems.one_of(("think", "answer", "plain", "native"), style=self.style)
        try:
            (self.before_image or "").format(1)
        except (LookupError, ValueError):
            problems.require(False, 'must be such as "Picture {}: "', before_image=self.before_image)
        if not 0 < self.min_pixels < self.max_pixels:
            problems.append(f"min_pixels={self.min_pixels} must be in 1..max_pixels, max_pixels={self.max_pixels}")
        if family.box_format == BoxFormat.ABSOLUTE_PIXELS and family.factor is None:
            problems.append(f"model_family {family.name!r} writes boxes in pixels: it needs a factor")
        problems.raise_all("request form")

    def facts(self) -> dict[str, Any]:
        """All of the form, JSON-like, for the keys of kept answers."""
        facts = asdict(self)
        if self.answer_form == AnswerForm.ONE_BOX:  # keys of earlier versions, which had no other form, stay valid
            del facts["answer_form"]
        return facts


@dataclass(frozen=True)
class ChatRequest:
    """One user turn."""

    messages: list[dict[str, Any]]
    image_sizes: tuple[ImageSizes, ...]  # one entry an image


def build_request(loaded: LoadedSample, form: RequestForm) -> ChatRequest:
    """The user turn in OpenAI's form, with images as PNG data URLs. Raises SampleError as `build_turn` does."""
    request = build_turn(loaded, form)
    for message in request.messages:
        for part in message["content"]:
            if part["type"] == "image":
                part |= {"type": "image_url", "image_url": {"url": png_data_url(part.pop("image"))}}
    return request


def build_turn(loaded: LoadedSample, form: RequestForm) -> ChatRequest:
    """The user turn in a processor's form, with Pillow images under "image".

    Raises:
        SampleError: with a rule of `open_images` or of `decode_images`.
    """
    sample, model_family = loaded.sample, form.model_family
    # 1. Images: check the headers, then decode and resize one image after the other.
    stored = open_images(loaded, form.max_image_pixels, form.max_sample_pixels)
    # `map` drops each decoded image once it is resized, before the next one is decoded. A loop variable would keep it.
    image_sizes, images = zip(*map(partial(_sent, form), decode_images(sample.id, stored)), strict=True)
    # 2. Text: the question with its boxes in the model's format, and the suffix of the style.
    style, suffix = form.style, None
    if style == "native":
        # A family's own suffix asks for one box, of which it names no image.
        chooses = isinstance(sample.answer, ChoiceAnswer | BoxesAnswer)
        style, suffix = (PromptStyle.ANSWER, None) if chooses else (PromptStyle.PLAIN, model_family.suffix)
    turn = build_messages(
        sample,
        image_sizes,
        model_family.box_format,
        PromptStyle(style),
        suffix=suffix,
        question_box=model_family.question_box,
        answer_form=form.answer_form,
    )
    # 3. Put each image, with its label, in place of its placeholder.
    before = model_family.before_image if form.before_image is None else form.before_image
    for message in turn:
        message["content"] = _with_images(message["content"], images, before, model_family.after_image)
    return ChatRequest(turn, image_sizes)


def _with_images(
    content: list[dict[str, Any]], images: Sequence[Image.Image], before: str, after: str
) -> list[dict[str, Any]]:
    """The parts of one turn, where each image placeholder is replaced by the label and the image."""
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
    """The sizes of an image, and the image in the size in which it is sent."""
    sizes = ImageSizes(image.size, _sent_size(image.size, form))
    size = sizes.resized
    return sizes, image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _sent_size(size: tuple[int, int], form: RequestForm) -> tuple[int, int]:
    """The (width, height) in which an image of `size` is sent."""
    if form.model_family.factor is not None:
        fitted = fit_size(size, form.model_family.factor, form.min_pixels, form.max_pixels)
        # The server resizes by the same rule. So the size is fitted until it no longer changes; a very long and narrow
        # image needs several rounds.
        return fitted if fitted == size else _sent_size(fitted, form)
    # Without pixels in the answer, only the upper limit matters.
    shrink = min(1.0, (form.max_pixels / (size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink))


def png_data_url(image: Image.Image) -> str:
    """The image as a data URL with a PNG, which is lossless."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
