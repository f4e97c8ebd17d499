"""The input of a reward: one completion with its sample, text, tokens, and the boxes that were parsed from the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from datamodules.samples.answer_text import AnswerForm, ParsedAnswer, ParseFailure, parse_answer
from datamodules.samples.box_matching import BoxMatching, WrittenBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, Sample
from datamodules.samples.scores import TextScore, score_text, true_boxes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt. The text is parsed once, when a reward first needs the result.

    Args:
        sample: question, file names of the images, true answer, task, and further facts (`extra`).
        image_sizes: for each image of the sample (width, height) in pixels: original, and as the model sees it.
        box_format: how the model writes coordinates.
        text: without special tokens.
        token_ids: [T]; the last one is the end token, unless the completion was cut.
        finish_reason: "stop" after an end token, "length" if the completion was cut at `max_tokens`.
        max_tokens: the limit of T, `rollout.max_new_tokens`.
        answer_form: what the prompt asks for (`data.answer_form`).
    """

    sample: Sample
    image_sizes: Sequence[ImageSizes]
    box_format: BoxFormat
    text: str
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason = "stop"
    max_tokens: int = 1024
    answer_form: AnswerForm = AnswerForm.ONE_BOX

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def question(self) -> str:
        """The text of the user's turn."""
        return self.sample.question

    @cached_property
    def true_boxes(self) -> tuple[BoxAnswer, ...]:
        """The true boxes of all images; each names its image. () if the answer is a choice."""
        return true_boxes(self.sample.answer)

    @cached_property
    def score(self) -> TextScore:
        """The boxes that count, their IoU, and the format. Benchmarks score a text in the same way.

        Raises:
            ValueError: the true answer has no box (in the one-box form: not one box) in an image of the sample.
        """
        how = (self.image_sizes, self.box_format)
        return score_text(self.text, self.sample.answer, *how, form=self.answer_form, parsed=self.parsed)

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
        """All boxes of the answer, in the order written; () if none can be read.

        `box` is xyxy, 0-1 of the original image. It may be inverted or outside the image, as the model wrote it. In the
        one-box form `image` is the true box's image, because the answer does not name one. With named images it is the
        image that the answer names; None if the question has no such image, and then `box` has the numbers as written.
        """
        if self.answer_form == AnswerForm.NAMED_IMAGE:
            return self.score.matching.written
        if isinstance(self.parsed, ParseFailure) or not self.true_boxes:
            return ()
        image = self.true_boxes[0].image
        sizes = self.image_sizes[image]
        return tuple(
            WrittenBox(image, sizes.to_unit(written.values, self.box_format), written.label)
            for written in self.parsed.boxes
        )

    @cached_property
    def matching(self) -> BoxMatching:
        """All boxes of the answer against all true boxes."""
        if self.answer_form == AnswerForm.NAMED_IMAGE:
            return self.score.matching
        return BoxMatching(self.boxes, self.true_boxes)

    @cached_property
    def named_images(self) -> tuple[int, ...]:
        """The images that the boxes of the answer name by `"image": k`, k counted from 1, as indices from 0."""
        if isinstance(self.parsed, ParseFailure):
            return ()
        return tuple(box.image - 1 for box in self.parsed.boxes if box.image is not None)


@dataclass(frozen=True)
class Failed:
    """The return value of a reward that could not judge a completion, for example because a server did not answer.

    The failure is counted as `reward/<name>/failed`. With `value=None`, the group of the completion is skipped in this
    step, unless the weight of the reward is 0. With a number, the completion gets this reward.
    """

    value: float | None = None
