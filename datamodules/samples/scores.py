"""The score of one model text: its box, its IoU, its format, or the reason why it has no box. Rewards and benchmarks
both use it.

`answer_text.parse_answer` finds the boxes: in an answer block all of them, in any other text those from the conclusion
on. So "first" means the first box of the answer, not a box that the model mentions before it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.samples.answer_text import ParseFailure, is_well_formed, parse_answer
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes, iou
from datamodules.samples.sample import BoxAnswer, Sample, SampleError

# Which of several boxes counts. "best" picks the box with the highest IoU. It is an oracle, because it uses the true
# box; it exists for comparison with evaluation code that does the same.
BoxChoice = Literal["first", "last", "best"]


@dataclass(frozen=True)
class TextScore:
    """A good answer: `TextScore(box=(0.1, 0.2, 0.5, 0.6), iou=0.8, well_formed=True, failure=None)`."""

    box: Box | None  # the box that counts: xyxy, 0-1 of the answer's image
    iou: float  # with the true box, 0-1; 0 without a box
    well_formed: bool  # whether the text earns the format reward
    failure: str | None  # a kind of `answer_text.ParseFailure` if no box could be read, else None


def require_box(sample: Sample) -> BoxAnswer:
    """The sample's answer, which must be one box. Training and sampling cannot use another kind of answer.

    Raises:
        SampleError: with the rule "no_box_answer".
    """
    if not isinstance(sample.answer, BoxAnswer):
        raise SampleError(sample.id, "no_box_answer", f"the answer is a {type(sample.answer).__name__}")
    return sample.answer


def score_text(
    text: str,
    answer: BoxAnswer,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    which: BoxChoice = "first",
    lenient: bool = False,
) -> TextScore:
    """Score one text against the true box.

    Args:
        text: the completion of a model.
        answer: the true box, and the index of its image.
        image_sizes: the sizes of the sample's images, one entry per image.
        box_format: the format of the numbers in `text`. They are converted with the sizes of the image `answer.image`;
            the format is never guessed from the numbers or from the true box.
        which: which of several boxes counts. With "first", further boxes cannot raise the score.
        lenient: read the box notations of other models too, as in `parse_answer`.

    Raises:
        ValueError: `answer` is not one box, or it names an image that has no sizes.
    """
    if not isinstance(answer, BoxAnswer):
        raise ValueError(f"scoring needs an answer of one box, got {type(answer).__name__}")
    if not 0 <= answer.image < len(image_sizes):
        raise ValueError(f"answer is in image {answer.image}, but there are {len(image_sizes)} images")
    # The two checks are independent: a tolerantly read box may have the wrong format.
    parsed, well_formed = parse_answer(text, lenient), is_well_formed(text)
    if isinstance(parsed, ParseFailure):
        return TextScore(None, 0.0, well_formed, parsed.kind)
    # From the model's numbers to 0-1 of the image, where the true box is given too.
    boxes = [image_sizes[answer.image].to_unit(written.values, box_format) for written in parsed.boxes]
    box = max(boxes, key=lambda box: iou(box, answer.box)) if which == "best" else boxes[-1 if which == "last" else 0]
    return TextScore(box, iou(box, answer.box), well_formed, None)
