"""Chat messages and target texts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.encoding.messages import (
    ANSWER_SUFFIX,
    OFFICIAL_QWEN_SUFFIX,
    THINK_SUFFIX,
    PromptStyle,
    build_messages,
    target_text,
)
from datamodules.samples.answer_text import is_well_formed, parse_answer
from datamodules.samples.boxes import BoxFormat, ImageSizes, iou
from datamodules.samples.sample import BoxAnswer, BoxPart, ChoiceAnswer, ImagePart, Sample, SampleError, TextPart

WRITTEN = "<|box_start|>(139,305),(495,743)<|box_end|>"
SAMPLE = Sample(
    id="mig_bench/2000",
    source="MIG-Bench",
    task="multi_view",
    images=("a.png", "b.png"),
    messages=(
        ImagePart(0),
        ImagePart(1),
        TextPart("The object in the first image("),
        BoxPart(0, (0.139, 0.305, 0.495, 0.743), WRITTEN),
        TextPart("). Locate it in the 2th image. "),
    ),
    answer=BoxAnswer(1, (0.25, 0.5, 0.75, 0.9), "cat"),
    thinking="It turned left.",
)
IMAGE_SIZES = (ImageSizes((1000, 1000), (560, 560)), ImageSizes((640, 480), (644, 476)))


def content(
    style: PromptStyle, box_format: BoxFormat = BoxFormat.ABSOLUTE_PIXELS, sample: Sample = SAMPLE
) -> list[dict]:
    (message,) = build_messages(sample, IMAGE_SIZES, box_format, style)
    assert message["role"] == "user"
    return message["content"]


def test_suffixes_are_the_published_wordings() -> None:
    assert THINK_SUFFIX == (
        " First output the thinking process in <think> </think> tags and then output the final answer in "
        "<answer> </answer> tags. Output the bounding box coordinates in JSON format."
    )
    assert ANSWER_SUFFIX == " Output the bounding box coordinates in JSON format."
    assert OFFICIAL_QWEN_SUFFIX == ("Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words.")


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        (BoxFormat.ABSOLUTE_PIXELS, "[78, 171, 277, 416]"),
        (BoxFormat.RELATIVE_1000, "[139, 305, 495, 743]"),
        (BoxFormat.NORMALIZED, "[0.139, 0.305, 0.495, 0.743]"),
    ],
)
def test_a_box_in_the_question_is_written_in_the_models_convention(box_format, box) -> None:
    question = f"The object in the first image({box}). Locate it in the 2th image."
    assert content(PromptStyle.THINK, box_format) == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": question + THINK_SUFFIX},
    ]
    assert content(PromptStyle.ANSWER, box_format)[-1]["text"] == question + ANSWER_SUFFIX
    assert content(PromptStyle.PLAIN, box_format)[-1]["text"] == question + " "


def test_a_box_of_another_image_uses_that_images_geometry() -> None:
    part = BoxPart(1, (0.139, 0.305, 0.495, 0.743), WRITTEN)
    sample = replace(SAMPLE, messages=(ImagePart(0), ImagePart(1), TextPart("At "), part))
    assert content(PromptStyle.PLAIN, sample=sample)[-1]["text"] == "At [90, 145, 319, 354]"


@pytest.mark.parametrize("box_format", list(BoxFormat))
def test_the_official_style_keeps_boxes_as_written_and_adds_no_space(box_format) -> None:
    expected = f"The object in the first image({WRITTEN}). Locate it in the 2th image. " + OFFICIAL_QWEN_SUFFIX
    assert content(PromptStyle.OFFICIAL, box_format)[-1]["text"] == expected


def test_images_keep_their_places_between_texts() -> None:
    messages = (
        TextPart("First: "),
        ImagePart(0),
        TextPart("Second: "),
        TextPart("now "),
        ImagePart(1),
        TextPart("Which?"),
    )
    assert content(PromptStyle.ANSWER, sample=replace(SAMPLE, messages=messages)) == [
        {"type": "text", "text": "First: "},
        {"type": "image"},
        {"type": "text", "text": "Second: now "},
        {"type": "image"},
        {"type": "text", "text": "Which?" + ANSWER_SUFFIX},
    ]


def test_a_suffix_after_an_image_is_a_text_of_its_own() -> None:
    sample = replace(SAMPLE, messages=(TextPart("Which? "), ImagePart(0), ImagePart(1)))
    assert content(PromptStyle.THINK, sample=sample)[-1] == {"type": "text", "text": THINK_SUFFIX.lstrip()}
    assert content(PromptStyle.PLAIN, sample=sample)[-1] == {"type": "image"}


RESERVED_TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad", "im_start", "im_end")


@pytest.mark.parametrize("token", [f"<|{name}|>" for name in (*RESERVED_TOKENS, "endoftext")])
@pytest.mark.parametrize("style", list(PromptStyle))
def test_a_reserved_token_that_parts_join_to_is_refused(token: str, style: PromptStyle) -> None:
    for cut in range(1, len(token)):
        halves = (TextPart("Where is " + token[:cut]), TextPart(token[cut:] + "?"))
        sample = replace(SAMPLE, messages=(ImagePart(0), ImagePart(1), *halves))
        assert Sample.from_json(sample.to_json()) == sample  # each part by itself is sound
        with pytest.raises(SampleError) as caught:
            content(style, sample=sample)
        assert caught.value.rule == "reserved_token" and caught.value.sample_id == sample.id
        assert token in caught.value.detail


def test_a_reserved_token_is_refused_where_a_written_box_or_an_empty_text_joins_it() -> None:
    halves = (TextPart("<|im_"), TextPart(""), TextPart("end|>"))
    with pytest.raises(SampleError, match="reserved_token"):
        content(PromptStyle.PLAIN, sample=replace(SAMPLE, messages=(ImagePart(0), ImagePart(1), *halves)))
    written = (TextPart("<|im_"), BoxPart(0, (0.1, 0.2, 0.3, 0.4), "end|>"), TextPart(" where?"))
    sample = replace(SAMPLE, messages=(ImagePart(0), ImagePart(1), *written))
    with pytest.raises(SampleError, match="reserved_token"):
        content(PromptStyle.OFFICIAL, sample=sample)
    assert "<|im_[100, 200, 300, 400] where?" in content(PromptStyle.THINK, BoxFormat.RELATIVE_1000, sample)[-1]["text"]


def test_halves_of_a_token_around_an_image_join_to_nothing() -> None:
    sample = replace(SAMPLE, messages=(ImagePart(0), TextPart("<|im_"), ImagePart(1), TextPart("end|>?")))
    assert [part["type"] for part in content(PromptStyle.PLAIN, sample=sample)] == ["image", "text", "image", "text"]


def test_building_twice_gives_equal_and_separate_messages() -> None:
    first = build_messages(SAMPLE, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS, PromptStyle.THINK)
    first[0]["content"][-1]["text"] = ""
    assert content(PromptStyle.THINK)[-1]["text"].endswith(THINK_SUFFIX)


@pytest.mark.parametrize("box_format", list(BoxFormat))
def test_the_target_is_well_formed_and_means_the_true_box(box_format) -> None:
    text = target_text(SAMPLE, IMAGE_SIZES, box_format, PromptStyle.THINK)
    assert is_well_formed(text)
    parsed = parse_answer(text)
    assert parsed.thinking == SAMPLE.thinking
    assert parsed.boxes[0].label == "cat"
    assert iou(IMAGE_SIZES[1].to_unit(parsed.boxes[0].values, box_format), SAMPLE.answer.box) > 0.98


def test_the_target_without_thinking_is_the_bare_fenced_json() -> None:
    text = target_text(SAMPLE, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS, PromptStyle.ANSWER)
    assert text == '```json\n{"bbox_2d": [161, 238, 483, 428], "label": "cat"}\n```'


@pytest.mark.parametrize("style", [PromptStyle.PLAIN, PromptStyle.OFFICIAL])
def test_styles_without_a_target_are_refused(style) -> None:
    with pytest.raises(ValueError, match="no target text"):
        target_text(SAMPLE, IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS, style)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"thinking": None}, "missing_thinking"),
        ({"answer": ChoiceAnswer("A", ("x", "y"))}, "no_box_answer"),
        ({"answer": BoxAnswer(1, (0.5, 0.5, 0.5001, 0.9), "sliver")}, "box_too_small"),
        ({"answer": BoxAnswer(1, (0.9999, 0.5, 1.0, 0.9), "edge")}, "box_too_small"),
    ],
)
def test_samples_without_a_usable_target_are_rejected_by_rule(change, rule) -> None:
    with pytest.raises(SampleError) as caught:
        target_text(replace(SAMPLE, **change), IMAGE_SIZES, BoxFormat.ABSOLUTE_PIXELS, PromptStyle.THINK)
    assert (caught.value.sample_id, caught.value.rule) == (SAMPLE.id, rule)


def test_a_suffix_and_a_form_of_boxes_can_be_given() -> None:
    form = "<|box_start|>({},{}),({},{})<|box_end|>"
    (message,) = build_messages(SAMPLE, IMAGE_SIZES, BoxFormat.RELATIVE_1000, PromptStyle.PLAIN, "Format: x.", form)
    text = f"The object in the first image({WRITTEN}). Locate it in the 2th image. Format: x."
    assert message["content"][-1] == {"type": "text", "text": text}


@pytest.mark.parametrize("image_sizes", [IMAGE_SIZES[:1], IMAGE_SIZES * 2, ()])
def test_one_geometry_for_each_image_is_required(image_sizes) -> None:
    with pytest.raises(ValueError, match="2 images"):
        build_messages(SAMPLE, image_sizes, BoxFormat.ABSOLUTE_PIXELS, PromptStyle.THINK)
    with pytest.raises(ValueError, match="2 images"):
        target_text(SAMPLE, image_sizes, BoxFormat.ABSOLUTE_PIXELS, PromptStyle.THINK)
