"""The answer form that names images: rendering, the strict format check, prompts and targets."""

from dataclasses import replace

import pytest

from datamodules.encoding.messages import (
    NAMED_ANSWER_SUFFIX,
    NAMED_THINK_SUFFIX,
    THINK_SUFFIX,
    PromptStyle,
    build_messages,
    target_text,
)
from datamodules.samples.answer_text import AnswerForm, is_well_formed, parse_answer, render_answer, render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer, ChoiceAnswer, ImagePart, Sample, SampleError, TextPart
from datamodules.samples.scores import require_boxes

NAMED = AnswerForm.NAMED_IMAGE
ONE, TWO = ParsedBox((1, 2, 3, 4), "a", 1), ParsedBox((5, 6, 7, 8), 'b <c> "d"', 2)
SIZES = [ImageSizes((640, 480), (644, 476)), ImageSizes((100, 100), (112, 112))]
BOXES = BoxesAnswer((BoxAnswer(1, (0.5, 0.5, 1.0, 1.0), "cup"), BoxAnswer(0, (0.0, 0.0, 0.5, 0.5), "cup")))
SAMPLE = Sample(
    "s", "test", "all", ("a.png", "b.png"), (ImagePart(0), ImagePart(1), TextPart("Find the cups.")), BOXES, "Two cups."
)


def wrapped(answer):
    return f"<think>t</think><answer>{answer}</answer>"


def test_one_box_is_an_object_and_several_are_a_list():
    assert render_boxes([ONE], None) == '```json\n{"image": 1, "bbox_2d": [1, 2, 3, 4], "label": "a"}\n```'
    text = render_boxes([ONE, TWO], "t")
    assert text == wrapped(
        '```json\n[{"image": 1, "bbox_2d": [1, 2, 3, 4], "label": "a"},\n'
        '{"image": 2, "bbox_2d": [5, 6, 7, 8], "label": "b \\u003cc> \\"d\\""}]\n```'
    )
    assert parse_answer(text).boxes == (ONE, TWO) and parse_answer(text).thinking == "t"
    assert is_well_formed(text, NAMED) and not is_well_formed(text)


@pytest.mark.parametrize(
    "boxes", [[], [ParsedBox((1, 2, 3, 4), "a")], [replace(ONE, image=0)], [replace(ONE, values=(1,))]]
)
def test_what_is_no_answer_of_this_form_is_not_rendered(boxes):
    with pytest.raises(ValueError, match="an answer"):
        render_boxes(boxes, None)


OBJECT = '{"image": 1, "bbox_2d": [1, 2, 3, 4]}'


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (OBJECT, True),
        (f"[{OBJECT}]", True),
        (f"```json\n[{OBJECT}, {OBJECT}]\n```", True),
        ('{"bbox_2d": [1, 2, 3, 4], "image": 12, "label": "a", "sure": true}', True),
        ("[]", False),
        ("[[]]", False),
        (f"[[{OBJECT}]]", False),
        (f"{OBJECT}{OBJECT}", False),
        (f"{OBJECT},", False),
        (f"[{OBJECT}, 3]", False),
        (f"[{OBJECT}", False),
        ('{"bbox_2d": [1, 2, 3, 4]}', False),
        (f'[{OBJECT}, {{"bbox_2d": [1, 2, 3, 4]}}]', False),
        ('{"image": "1", "bbox_2d": [1, 2, 3, 4]}', False),
        ('{"image": 0, "bbox_2d": [1, 2, 3, 4]}', False),
        ('{"image": 1.5, "bbox_2d": [1, 2, 3, 4]}', False),
        ('{"image": true, "bbox_2d": [1, 2, 3, 4]}', False),
        ('{"image": 1e999, "bbox_2d": [1, 2, 3, 4]}', False),
        ('{"image": 1, "image": 1, "bbox_2d": [1, 2, 3, 4]}', False),
        ('{"image": 1, "bbox_2d": [3, 2, 1, 4]}', False),
        ('{"image": 1, "bbox_2d": [1, 2, 3, 4], "label": 3}', False),
    ],
)
def test_the_format_of_this_form_is_strict(answer, is_right):
    assert is_well_formed(wrapped(answer), NAMED) == is_right
    assert not is_well_formed(answer, NAMED), "the tags are needed too"


def test_the_papers_form_is_as_before():
    text = render_answer((1, 2, 3, 4), "a", "t")
    assert is_well_formed(text) and not is_well_formed(text, NAMED)


@pytest.mark.parametrize("style", [PromptStyle.THINK, PromptStyle.ANSWER])
@pytest.mark.parametrize("box_format", list(BoxFormat))
def test_targets_name_the_image_of_each_box_in_the_order_of_the_sample(style, box_format):
    text = target_text(SAMPLE, SIZES, box_format, style, NAMED)
    boxes = parse_answer(text).boxes
    assert [(box.image, box.label) for box in boxes] == [(2, "cup"), (1, "cup")]
    assert [box.values for box in boxes] == [
        SIZES[answer.image].to_model(answer.box, box_format) for answer in BOXES.boxes
    ]
    assert is_well_formed(text, NAMED) == (style == PromptStyle.THINK)


def suffix(sample, style, **form):
    (message,) = build_messages(sample, SIZES, BoxFormat.ABSOLUTE_PIXELS, style, **form)
    return message["content"][-1]["text"].removeprefix("Find the cups.")


def test_prompts_ask_for_the_image_where_it_is_needed():
    one = replace(SAMPLE, answer=BOXES.boxes[0])
    assert suffix(one, PromptStyle.THINK) == THINK_SUFFIX
    assert suffix(one, PromptStyle.THINK, answer_form=NAMED) == NAMED_THINK_SUFFIX
    assert suffix(SAMPLE, PromptStyle.THINK) == NAMED_THINK_SUFFIX, "several boxes need it in any case"
    assert suffix(SAMPLE, PromptStyle.ANSWER) == NAMED_ANSWER_SUFFIX
    assert suffix(SAMPLE, PromptStyle.PLAIN, answer_form=NAMED) == ""
    assert "letter" in suffix(
        replace(SAMPLE, answer=ChoiceAnswer("A", ("x", "y"))), PromptStyle.THINK, answer_form=NAMED
    )


def test_which_samples_each_form_can_use():
    one, choice = replace(SAMPLE, answer=BOXES.boxes[0]), replace(SAMPLE, answer=ChoiceAnswer("A", ("x", "y")))
    assert require_boxes(one, AnswerForm.ONE_BOX) == require_boxes(one, NAMED) == BOXES.boxes[:1]
    assert require_boxes(SAMPLE, NAMED) == BOXES.boxes
    for sample, form in ((SAMPLE, AnswerForm.ONE_BOX), (choice, AnswerForm.ONE_BOX), (choice, NAMED)):
        with pytest.raises(SampleError, match="no_box_answer") as caught:
            require_boxes(sample, form)
        assert ("data.answer_form=named_image" in str(caught.value)) == (sample is SAMPLE)
