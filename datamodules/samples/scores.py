"""The score of one model text: its box, its IoU, its format, or the reason why it has no box. Rewards and benchmarks
both use it.

`answer_text.parse_answer` finds the boxes: in an answer block all of them, in any other text those from the conclusion
on. So "first" means the first box of the answer, not a box that the model mentions before it answers.

An answer that names images (`AnswerForm.NAMED_IMAGE`) is scored by the pairing of all its boxes with all true boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from datamodules.samples.answer_text import AnswerForm, ParsedAnswer, ParseFailure, is_well_formed, parse_answer
from datamodules.samples.box_matching import BoxMatching, WrittenBox, named_boxes
from datamodules.samples.boxes import Box, BoxFormat, ImageSizes, iou
from datamodules.samples.sample import Answer, BoxAnswer, BoxesAnswer, Sample, SampleError

# Which of several boxes counts. "best" picks the box with the highest IoU. It is an oracle, because it uses the true
# box; it exists for comparison with evaluation code that does the same.
BoxChoice = Literal["first", "last", "best"]


@dataclass(frozen=True)
class TextScore:
    """A good answer: `TextScore(box=(0.1, 0.2, 0.5, 0.6), iou=0.8, well_formed=True, failure=None)`."""

    box: Box | None  # the box that counts: xyxy, 0-1 of the answer's image; None where the answer names images
    iou: float  # with the true box, 0-1; 0 without a box. With named images: `BoxMatching.mean_iou`
    well_formed: bool  # whether the text earns the format reward
    failure: str | None  # a kind of `answer_text.ParseFailure` if no box could be read, else None
    matching: BoxMatching = field(default=BoxMatching((), ()), compare=False)  # the boxes that count, and the true ones

    def is_right(self, threshold: float, min_f1: float = 1.0) -> bool:
        """Whether F1 at this IoU is at least `min_f1`. For one box at 1.0: whether its IoU is above `threshold`."""
        return self.matching.f1(threshold) >= min_f1


def true_boxes(answer: Answer) -> tuple[BoxAnswer, ...]:
    """The true boxes of all images; () if the answer is a choice."""
    if isinstance(answer, BoxesAnswer):
        return answer.boxes
    return (answer,) if isinstance(answer, BoxAnswer) else ()


def require_boxes(sample: Sample, form: AnswerForm) -> tuple[BoxAnswer, ...]:
    """The true boxes of a sample that training and sampling can use in this form: exactly one box in the one-box form.

    Raises:
        SampleError: with the rule "no_box_answer".
    """
    boxes = true_boxes(sample.answer)
    if not boxes or (form == AnswerForm.ONE_BOX and not isinstance(sample.answer, BoxAnswer)):
        kind = type(sample.answer).__name__
        cure = "; data.answer_form=named_image trains on it" if boxes else ""
        raise SampleError(sample.id, "no_box_answer", f"the answer is a {kind}{cure}")
    return boxes


def score_text(
    text: str,
    answer: Answer,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    which: BoxChoice = "first",
    lenient: bool = False,
    form: AnswerForm = AnswerForm.ONE_BOX,
    parsed: ParsedAnswer | ParseFailure | None = None,
) -> TextScore:
    """Score one text against the true box, or the true boxes.

    Args:
        text: the completion of a model.
        answer: the true box, and the index of its image; with NAMED_IMAGE maybe several boxes.
        image_sizes: the sizes of the sample's images, one entry per image.
        box_format: the format of the numbers in `text`. They are converted with the sizes of the image `answer.image`,
            or of the image that the answer names; the format is never guessed from the numbers or from the true box.
        which: which of several boxes counts in the one-box form. With "first", further boxes cannot raise the score.
        lenient: read the box notations of other models too, as in `parse_answer`.
        form: with NAMED_IMAGE all boxes count, each in the image that it names.
        parsed: what `parse_answer` returns for these arguments, if the caller has it already.

    Raises:
        ValueError: `answer` has no box, has several in the one-box form, or names an image that has no sizes.
    """
    true = true_boxes(answer)
    if not true or (form == AnswerForm.ONE_BOX and not isinstance(answer, BoxAnswer)):
        raise ValueError(f"scoring needs an answer of one box, got {type(answer).__name__}")
    for one in true:
        if not 0 <= one.image < len(image_sizes):
            raise ValueError(f"answer is in image {one.image}, but there are {len(image_sizes)} images")
    # The two checks are independent: a tolerantly read box may have the wrong format.
    parsed, well_formed = parsed or parse_answer(text, lenient), is_well_formed(text, form)
    if isinstance(parsed, ParseFailure):
        return TextScore(None, 0.0, well_formed, parsed.kind, BoxMatching((), true))
    if form == AnswerForm.NAMED_IMAGE:
        matching = BoxMatching(named_boxes(parsed, image_sizes, box_format), true)
        return TextScore(None, matching.mean_iou, well_formed, None, matching)
    return _score_one_box(parsed, true[0], image_sizes, box_format, which, well_formed)


def _score_one_box(
    parsed: ParsedAnswer,
    answer: BoxAnswer,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    which: BoxChoice,
    well_formed: bool,
) -> TextScore:
    # From the model's numbers to 0-1 of the image, where the true box is given too.
    boxes = [image_sizes[answer.image].to_unit(written.values, box_format) for written in parsed.boxes]
    box = max(boxes, key=lambda box: iou(box, answer.box)) if which == "best" else boxes[-1 if which == "last" else 0]
    matching = BoxMatching((WrittenBox(answer.image, box, None),), (answer,))
    return TextScore(box, iou(box, answer.box), well_formed, None, matching)
