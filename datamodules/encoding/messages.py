"""Chat messages and target texts: how a sample is put to a model, and what the model should write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from datamodules.samples.answer_text import render_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes, box_fault
from datamodules.samples.sample import RESERVED, BoxPart, ChoiceAnswer, ImagePart, Sample, SampleError, TextPart
from datamodules.samples.scores import require_box

ANSWER_SUFFIX = " Output the bounding box coordinates in JSON format."
# The paper's prompt (§3.2.1), after the question.
THINK_SUFFIX = (
    " First output the thinking process in <think> </think> tags and then output the final answer in"
    " <answer> </answer> tags." + ANSWER_SUFFIX
)
CHOICE_SUFFIX = " Answer with the letter of one option."
CHOICE_THINK_SUFFIX = THINK_SUFFIX.removesuffix(ANSWER_SUFFIX) + " The final answer is the letter of one option."
# MIG-Bench's official prompts; the misspelling, and the second box_start for Qwen models, are part of them.
OFFICIAL_ENDING = "Don't generate addtional words."
OFFICIAL_QWEN_SUFFIX = f"Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. {OFFICIAL_ENDING}"

QUESTION_BOX = "[{}, {}, {}, {}]"  # how a box inside a question is written
# The field of a sample's `extra` with a text that the benchmark's own prompt puts before the question.
OFFICIAL_PREFIX = "official_prefix"


class PromptStyle(StrEnum):
    """What follows the question."""

    THINK = "think"  # reason, then answer
    ANSWER = "answer"  # answer at once, in JSON
    PLAIN = "plain"  # the question as it is
    OFFICIAL = "official"  # the benchmark's own prompt: boxes in the question as written there, and its prefix


_SUFFIXES = {
    PromptStyle.THINK: THINK_SUFFIX,
    PromptStyle.ANSWER: ANSWER_SUFFIX,
    PromptStyle.PLAIN: "",
    PromptStyle.OFFICIAL: OFFICIAL_QWEN_SUFFIX,
}

# Questions with options carry their own in the official prompts.
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
) -> list[dict[str, Any]]:
    """One user turn for a processor's chat template; images keep their places, adjacent texts are joined.

    `image_sizes` has one entry per image of the sample. Boxes in the question are written in the model's box format.
    THINK and ANSWER put one space between question and suffix; OFFICIAL appends without one, as the official code does,
    and puts the sample's OFFICIAL_PREFIX before its first text. A `suffix` stands in the place of the style's own, and
    `question_box` is how the box's four numbers are written.

    Raises SampleError "reserved_token" for a text that holds one once its parts are joined.
    """
    _check_image_sizes(sample, image_sizes)
    content: list[dict[str, Any]] = []
    prefix = sample.extra.get(OFFICIAL_PREFIX, "") if style == PromptStyle.OFFICIAL else ""
    for part in sample.messages:
        if isinstance(part, ImagePart):
            content.append({"type": "image"})
        else:
            _append_text(content, prefix + _part_text(part, image_sizes, box_format, style, question_box))
            prefix = ""
    if suffix is None:
        suffix = (_CHOICE_SUFFIXES if isinstance(sample.answer, ChoiceAnswer) else _SUFFIXES)[style]
    if style in (PromptStyle.THINK, PromptStyle.ANSWER):
        if content and content[-1]["type"] == "text":
            content[-1]["text"] = content[-1]["text"].rstrip()
        else:
            suffix = suffix.lstrip()
    _append_text(content, suffix)
    _refuse_reserved(sample.id, content)
    return [{"role": "user", "content": content}]


def target_text(sample: Sample, image_sizes: Sequence[ImageSizes], box_format: BoxFormat, style: PromptStyle) -> str:
    """The completion that supervised training aims at.

    Raises ValueError for a style without a target, and SampleError when the sample has none: "no_box_answer",
    "missing_thinking", or "box_too_small" (rounded to the box format's grid, the box has no area left).
    """
    if style not in (PromptStyle.THINK, PromptStyle.ANSWER):
        raise ValueError(f"style {style!r} has no target text: use 'think' or 'answer'")
    _check_image_sizes(sample, image_sizes)
    answer = require_box(sample)
    if style == PromptStyle.THINK and sample.thinking is None:
        raise SampleError(sample.id, "missing_thinking", "style 'think' needs a rationale")
    sizes = image_sizes[answer.image]
    values = sizes.to_model(answer.box, box_format)
    if box_fault(sizes.to_unit(values, box_format)) == "degenerate":
        raise SampleError(sample.id, "box_too_small", f"{answer.box} becomes {values} in {box_format}")
    return render_answer(values, answer.label, sample.thinking if style == PromptStyle.THINK else None)


def _part_text(
    part: TextPart | BoxPart,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    style: PromptStyle,
    question_box: str,
) -> str:
    if isinstance(part, TextPart) or style == PromptStyle.OFFICIAL:
        return part.text
    return question_box.format(*image_sizes[part.image].to_model(part.box, box_format))


def _append_text(content: list[dict[str, Any]], text: str) -> None:
    if content and content[-1]["type"] == "text":
        content[-1]["text"] += text
    elif text:
        content.append({"type": "text", "text": text})


def _refuse_reserved(sample_id: str, content: Sequence[Mapping[str, Any]]) -> None:
    """Each part was looked at when the sample was read; two side by side may spell a token that neither holds."""
    for part in content:
        if token := RESERVED.search(part.get("text", "")):
            raise SampleError(sample_id, "reserved_token", f"the parts of the question join to {token.group()}")


def _check_image_sizes(sample: Sample, image_sizes: Sequence[ImageSizes]) -> None:
    if len(image_sizes) != len(sample.images):
        raise ValueError(f"sample {sample.id!r} has {len(sample.images)} images but {len(image_sizes)} image_sizes")
