"""The score of one model text: its box and IoU, its format, or why it has no box. For rewards and benchmarks.

The boxes are those that `answer_text.parse_answer` lists: all of an answer block, and of any other text those from its
conclusion on. So "first" is the first box of the answer, not a box that is mentioned on the way to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.samples.answer_text import ParseFailure, is_well_formed, parse_answer
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes, iou
from datamodules.samples.sample import BoxAnswer, Sample, SampleError

# Which of several boxes counts. "best" looks at the true box: an oracle, for comparing with harnesses that do so.
BoxChoice = Literal["first", "last", "best"]


@dataclass(frozen=True)
class TextScore:
    """`TextScore(box=(0.1, 0.2, 0.5, 0.6), iou=0.8, well_formed=True, failure=None)` is a well-formed, good answer."""

    box: Box | None  # the box that counts, unit xyxy of the answer's image
    iou: float  # with the true box, 0-1; 0 without a box
    well_formed: bool  # earns the format reward
    failure: str | None  # why no box could be read (a kind of `answer_text.ParseFailure`), else None


def require_box(sample: Sample) -> BoxAnswer:
    """The sample's answer, which must be one box: training and sampling can use no other. Raises SampleError with the
    rule "no_box_answer"."""
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
    """Score one text against `answer`; `image_sizes` has one entry per image of the sample.

    The numbers in `text` are read in the model's `box_format` and in the sizes of the answer's own image
    (`answer.image`), never guessed from the numbers nor from the true box. Where the answer has several boxes, the
    first counts, so that more boxes can not raise the score, unless `which` says otherwise; `lenient` is
    `parse_answer`'s.
    Raises ValueError when `answer` is not one box or names an image that has no sizes.
    """
    if not isinstance(answer, BoxAnswer):
        raise ValueError(f"scoring needs an answer of one box, got {type(answer).__name__}")
    if not 0 <= answer.image < len(image_sizes):
        raise ValueError(f"answer is in image {answer.image}, but there are {len(image_sizes)} images")
    parsed, well_formed = parse_answer(text, lenient), is_well_formed(text)
    if isinstance(parsed, ParseFailure):
        return TextScore(None, 0.0, well_formed, parsed.kind)
    boxes = [image_sizes[answer.image].to_unit(written.values, box_format) for written in parsed.boxes]
    box = max(boxes, key=lambda box: iou(box, answer.box)) if which == "best" else boxes[-1 if which == "last" else 0]
    return TextScore(box, iou(box, answer.box), well_formed, None)
