"""The input of a reward: one completion with its sample, text, tokens, and the boxes that were parsed from the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from datamodules.samples.answer_text import ParsedAnswer, ParseFailure, answer_text, parse_answer
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, BoxPart, Sample, TextPart
from datamodules.samples.scores import TextScore, score_text

FinishReason = Literal["stop", "length"]
_NAMED_IMAGE = re.compile(r'"image"\s*+:\s*+"?([0-9]{1,4})\b')


@dataclass(frozen=True)
class WrittenBox:
    """A box that the model wrote.

    `image` is an index into `Sample.images`. The answer format with one box names no image, so its box is in the image
    of the true box.
    """

    image: int
    box: Box  # xyxy, 0-1 of that image; it may be inverted or outside
    label: str | None


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt. The text is parsed once, when a reward first needs the result.

    Args:
        sample: question, file names of the images, true answer, task, and further facts (`extra`).
        image_sizes: the sizes of the sample's images, one entry per image.
        box_format: how the model writes coordinates.
        text: without special tokens.
        token_ids: [T], with the end token.
        finish_reason: "stop" after an end token, "length" if the completion was cut at `max_tokens`.
        max_tokens: the limit of T, `rollout.max_new_tokens`.
    """

    sample: Sample
    image_sizes: Sequence[ImageSizes]
    box_format: BoxFormat
    text: str
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason = "stop"
    max_tokens: int = 1024

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @cached_property
    def question(self) -> str:
        """The text of the user's turn."""
        parts = (part.text for part in self.sample.messages if isinstance(part, TextPart | BoxPart))
        return "".join(parts).strip()

    @cached_property
    def true_boxes(self) -> tuple[BoxAnswer, ...]:
        """The true boxes of all images; each names its image. () if the answer is a choice."""
        answer = self.sample.answer
        if isinstance(answer, BoxesAnswer):
            return answer.boxes
        return (answer,) if isinstance(answer, BoxAnswer) else ()

    @cached_property
    def score(self) -> TextScore:
        """The box that counts, its IoU, and the format. Benchmarks score a text in the same way.

        Raises:
            ValueError: the true answer is not one box in an image of the sample.
        """
        return score_text(self.text, self.sample.answer, self.image_sizes, self.box_format)

    @cached_property
    def parsed(self) -> ParsedAnswer | ParseFailure:
        """The parsed answer: its boxes in the model's own numbers, or the reason why there is no box."""
        return parse_answer(self.text)

    @property
    def thinking(self) -> str | None:
        """The text between the think tags; None without them, or without an answer."""
        return self.parsed.thinking if isinstance(self.parsed, ParsedAnswer) else None

    @cached_property
    def boxes(self) -> tuple[WrittenBox, ...]:
        """All boxes of the answer, in the order written."""
        if isinstance(self.parsed, ParseFailure) or not self.true_boxes:
            return ()
        image = self.true_boxes[0].image
        sizes = self.image_sizes[image]
        return tuple(
            WrittenBox(image, sizes.to_unit(written.values, self.box_format), written.label)
            for written in self.parsed.boxes
        )

    @cached_property
    def named_images(self) -> tuple[int, ...]:
        """The images that the answer names by `"image": k`, k counted from 1, as indices into `Sample.images`."""
        answer = answer_text(self.text) or ""
        return tuple(int(number) - 1 for number in _NAMED_IMAGE.findall(answer))


@dataclass(frozen=True)
class Failed:
    """The return value of a reward that could not judge a completion, for example because a server did not answer.

    The failure is counted as `reward/<name>/failed`. With `value=None`, the group of the completion is skipped in this
    step. With a number, the completion gets this reward.
    """

    value: float | None = None
