"""The chat messages of a sample, and the target text that the model should write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from datamodules.samples.answer_text import AnswerForm, render_answer, render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes, box_fault
from datamodules.samples.sample import (
    RESERVED,
    BoxAnswer,
    BoxesAnswer,
    BoxPart,
    ChoiceAnswer,
    ImagePart,
    Sample,
    SampleError,
)
from datamodules.samples.scores import require_boxes

ANSWER_SUFFIX = " Output the bounding box coordinates in JSON format."
# The paper's prompt (§3.2.1), after the question.
THINK_SUFFIX = (
    " First output the thinking process in <think> </think> tags and then output the final answer in"
    " <answer> </answer> tags." + ANSWER_SUFFIX
)
# The same for answers that name images. "each object" leaves open how many boxes there are.
NAMED_ANSWER_SUFFIX = " Output the image number and the bounding box coordinates of each object in JSON format."
NAMED_THINK_SUFFIX = THINK_SUFFIX.removesuffix(ANSWER_SUFFIX) + NAMED_ANSWER_SUFFIX
CHOICE_SUFFIX = " Answer with the letter of one option."
CHOICE_THINK_SUFFIX = THINK_SUFFIX.removesuffix(ANSWER_SUFFIX) + " The final answer is the letter of one option."
# MIG-Bench's official prompts. They contain the misspelling, and the second box_start in the prompt for Qwen models.
OFFICIAL_ENDING = "Don't generate addtional words."
OFFICIAL_QWEN_SUFFIX = f"Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. {OFFICIAL_ENDING}"

QUESTION_BOX = "[{}, {}, {}, {}]"  # the notation of a box inside a question
# Key in a sample's `extra`: a text that the benchmark's official prompt has before the question.
OFFICIAL_PREFIX = "official_prefix"


class PromptStyle(StrEnum):
    """The text after the question."""

    THINK = "think"  # asks for reasoning, then the answer
    ANSWER = "answer"  # asks only for the answer, in JSON
    PLAIN = "plain"  # nothing
    OFFICIAL = "official"  # the benchmark's own prompt: its notation of boxes in the question, its prefix and suffix


_SUFFIXES = {
    PromptStyle.THINK: THINK_SUFFIX,
    PromptStyle.ANSWER: ANSWER_SUFFIX,
    PromptStyle.PLAIN: "",
    PromptStyle.OFFICIAL: OFFICIAL_QWEN_SUFFIX,
}

# Questions whose answer names images. MIG-Bench has no official prompt for them.
_NAMED_SUFFIXES = _SUFFIXES | {PromptStyle.THINK: NAMED_THINK_SUFFIX, PromptStyle.ANSWER: NAMED_ANSWER_SUFFIX}

# Questions with options. In the official prompts, the question itself says how to answer.
_CHOICE_SUFFIXES = {
    PromptStyle.THINK: CHOICE_THINK_SUFFIX,
    PromptStyle.ANSWER: CHOICE_SUFFIX,
    PromptStyle.PLAIN: "",
    PromptStyle.OFFICIAL: "",
}


def build_messages(
    sample: Sample,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    style: PromptStyle,
    suffix: str | None = None,
    question_box: str = QUESTION_BOX,
    answer_form: AnswerForm = AnswerForm.ONE_BOX,
) -> list[dict[str, Any]]:
    """The user turn of a sample, for a processor's chat template. Images keep their places among the texts.

    Args:
        sample: the question and its images.
        image_sizes: the sizes of the sample's images, one entry per image.
        box_format: the format in which boxes inside the question are written.
        style: the text after the question. OFFICIAL also puts the sample's OFFICIAL_PREFIX before the question.
        suffix: replaces the text of the style.
        question_box: notation of a box inside the question, with four "{}" for its numbers.
        answer_form: what the style asks for. A question that several boxes answer asks for named images in any case.

    Raises:
        SampleError: with the rule "reserved_token": joined texts contain a special token.
    """
    _check_image_sizes(sample, image_sizes)
    # 1. The question: placeholders for images, and texts. Neighbouring texts are joined.
    content: list[dict[str, Any]] = []
    prefix = sample.extra.get(OFFICIAL_PREFIX, "") if style == PromptStyle.OFFICIAL else ""
    for part in sample.messages:
        if isinstance(part, ImagePart):
            content.append({"type": "image"})
            continue
        text = part.text
        # A box as four numbers in the model's format; OFFICIAL keeps the benchmark's notation.
        if isinstance(part, BoxPart) and style != PromptStyle.OFFICIAL:
            text = question_box.format(*image_sizes[part.image].to_model(part.box, box_format))
        _append_text(content, prefix + text)
        prefix = ""
    # 2. The suffix that asks for the form of the answer.
    if suffix is None:
        if isinstance(sample.answer, ChoiceAnswer):
            suffix = _CHOICE_SUFFIXES[style]
        else:
            form = AnswerForm.NAMED_IMAGE if isinstance(sample.answer, BoxesAnswer) else answer_form
            suffix = style_suffix(style, form)
    # This project's suffixes begin with a space, so exactly one space separates them from the question. The official
    # code appends its suffix without a space.
    if style in (PromptStyle.THINK, PromptStyle.ANSWER):
        if content and content[-1]["type"] == "text":
            content[-1]["text"] = content[-1]["text"].rstrip()
        else:
            suffix = suffix.lstrip()
    _append_text(content, suffix)
    _refuse_reserved(sample.id, content)
    return [{"role": "user", "content": content}]


def style_suffix(style: PromptStyle, answer_form: AnswerForm) -> str:
    """The text after a question for boxes."""
    return (_NAMED_SUFFIXES if answer_form == AnswerForm.NAMED_IMAGE else _SUFFIXES)[style]


def target_text(
    sample: Sample,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    style: PromptStyle,
    answer_form: AnswerForm = AnswerForm.ONE_BOX,
) -> str:
    """The target of supervised training: the completion that the model should write.

    Args:
        sample: its answer must be one box, with NAMED_IMAGE one or several; for the style THINK it must have thinking.
        image_sizes: the sizes of the sample's images, one entry per image.
        box_format: the format in which the box is written.
        style: THINK writes the thinking and the answer, ANSWER only the answer.
        answer_form: with NAMED_IMAGE each box names its image; boxes keep the order of the sample.

    Raises:
        ValueError: the style has no target.
        SampleError: with the rule "no_box_answer", "missing_thinking", or "box_too_small" (the box has no area after
            its numbers are rounded to the box format).
    """
    if style not in (PromptStyle.THINK, PromptStyle.ANSWER):
        raise ValueError(f"style {style!r} has no target text: use 'think' or 'answer'")
    _check_image_sizes(sample, image_sizes)
    boxes = require_boxes(sample, answer_form)
    if style == PromptStyle.THINK and sample.thinking is None:
        raise SampleError(sample.id, "missing_thinking", "style 'think' needs a rationale")
    thinking = sample.thinking if style == PromptStyle.THINK else None
    values = [_model_numbers(sample.id, box, image_sizes[box.image], box_format) for box in boxes]
    if answer_form == AnswerForm.ONE_BOX:
        return render_answer(values[0], boxes[0].label, thinking)
    written = [ParsedBox(four, box.label, box.image + 1) for four, box in zip(values, boxes, strict=True)]
    return render_boxes(written, thinking)


def _model_numbers(sample_id: str, answer: BoxAnswer, sizes: ImageSizes, box_format: BoxFormat) -> tuple[float, ...]:
    """The four numbers that the model should write. Raises SampleError "box_too_small"."""
    values = sizes.to_model(answer.box, box_format)
    if box_fault(sizes.to_unit(values, box_format)) == "degenerate":
        raise SampleError(sample_id, "box_too_small", f"{answer.box} becomes {values} in {box_format}")
    return values


def _append_text(content: list[dict[str, Any]], text: str) -> None:
    if content and content[-1]["type"] == "text":
        content[-1]["text"] += text
    elif text:
        content.append({"type": "text", "text": text})


def _refuse_reserved(sample_id: str, content: Sequence[Mapping[str, Any]]) -> None:
    """Raise SampleError if a joined text contains a special token."""
    # `Sample.from_json` has checked each part alone. Two joined parts can form a token that neither part contains.
    for part in content:
        if token := RESERVED.search(part.get("text", "")):
            raise SampleError(sample_id, "reserved_token", f"the parts of the question join to {token.group()}")


def _check_image_sizes(sample: Sample, image_sizes: Sequence[ImageSizes]) -> None:
    if len(image_sizes) != len(sample.images):
        raise ValueError(f"sample {sample.id!r} has {len(sample.images)} images but {len(image_sizes)} image_sizes")
