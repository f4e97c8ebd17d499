"""Which of several boxes is the answer, and boxes that only a person can read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.samples.answer_text import (
    ParsedAnswer,
    ParseFailure,
    has_answer_tags,
    is_well_formed,
    parse_answer,
    render_answer,
)
from datamodules.samples.box_texts import ParsedBox
from tests.datamodules.samples.hostile_answers import OBJ, OTHER, ta

NUMBERS = st.integers(-10, 10_000) | st.floats(0, 1).map(lambda value: round(value, 3))
thoughts = st.text().filter(lambda text: not has_answer_tags(text))


def first_box(text: str) -> tuple[float, ...]:
    return parse_answer(text).boxes[0].values


@pytest.mark.parametrize(
    "text",
    [
        "Image 1 shows a cat at [5, 6, 7, 8], image 2 one at [1, 2, 3, 4]. Therefore, the box is [1, 2, 3, 4].",
        "The dog is at (5,6),(7,8).\nThe answer is (1,2),(3,4).\nAnother dog is at (9,9),(10,10).",
        f"First: {OTHER}\nSecond: {OBJ}\nThe final answer is:\n```json\n{OBJ}\n```",
        f"The cup is at {OTHER}. If I had to choose, I would select [1, 2, 3, 4].",
        f"Candidates are {OTHER} and [9, 9, 10, 10].\n\n```json\n[{OBJ}]\n```",
        f"<think>t</think>The dog is at [5, 6, 7, 8]. So, the target is {OBJ}",
        "I compare [5, 6, 7, 8] with [7, 7, 9, 9]. Thus (1,2),(3,4)",
    ],
)
def test_the_box_of_the_conclusion_is_the_answer(text: str) -> None:
    assert first_box(text) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3, 4] or [5, 6, 7, 8]",
        "[1, 2, 3, 4]\n\n[5, 6, 7, 8]",  # a list, not a mention and a conclusion
        "The answer is [1, 2, 3, 4]. The box [5, 6, 7, 8] is too large.",
        "The cat is at [1, 2, 3, 4]. The dog is at [5, 6, 7, 8].",
        f"{OBJ} Therefore it is in the second image.",  # a conclusion without a box
        '{"bbox_2d": [1, 2, 3, 4], "label": "a"} {"bbox_2d": [5, 6, 7, 8], "label": "the answer is: So, b"}',
        '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "Therefore, b"}]',
        # an answer tag says where the answer begins: nothing is searched
        "<think>t</think><answer>a [1, 2, 3, 4] and so the answer is [5, 6, 7, 8]</answer>",
        "<think>t</think><answer>a [1, 2, 3, 4].\n\nTherefore, [5, 6, 7, 8]",
        "The answer is [5, 6, 7, 8]. <answer>[1, 2, 3, 4] The answer is [9, 9, 10, 10]</answer>",
    ],
)
def test_without_a_conclusion_and_in_an_answer_block_the_first_box_is_the_answer(text: str) -> None:
    assert first_box(text) == (1, 2, 3, 4)


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), st.text(), st.none() | thoughts)
def test_the_words_of_a_conclusion_change_no_rendered_answer(values, label: str, thinking: str | None) -> None:
    label = f"Therefore, the answer is: {label}"
    text = render_answer(values, label, thinking)
    assert parse_answer(text) == ParsedAnswer((ParsedBox(tuple(values), label),), thinking)


# ---- Boxes that a person can read ----


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("[10., 20, 30., 40]", (10, 20, 30, 40)),
        ("[+10, +20, 30, 40]", (10, 20, 30, 40)),
        ("[.5, .25, 1., 1]", (0.5, 0.25, 1, 1)),
        ("[010, 20, 30, 40]", (10, 20, 30, 40)),
        ("[-1., 20, 30, 40]", (-1, 20, 30, 40)),
        ("[10, 20, 30, 40,]", (10, 20, 30, 40)),
        ('["10", "20.", "+30", 40]', (10, 20, 30, 40)),
        ("['10', '20', '30', '40']", (10, 20, 30, 40)),
        ("\uff3b10, 20, 30, 40\uff3d", (10, 20, 30, 40)),
        ("\u301010\uff0c20\uff0c30\uff0c40\u3011", (10, 20, 30, 40)),
        ("[\uff11\uff10, \uff12\uff10, 30, 40]", (10, 20, 30, 40)),
    ],
)
def test_numbers_and_brackets_that_only_a_person_reads_are_a_box_and_earn_no_format_reward(written, values) -> None:
    body = f'{{"bbox_2d": {written}, "label": "a"}}'
    for text in (body, ta(body), f"```json\n[{body},]\n```", f'{{"bbox_2d": {written}, "label": "a",}}'):
        assert parse_answer(text).boxes == (ParsedBox(values, "a"),), text
        assert not is_well_formed(text)
    assert parse_answer(f"It is at {written}.").boxes == (ParsedBox(values, None),)
    assert parse_answer(f"{written} or [5, 6, 7, 8]").boxes[0].values == values  # still the first


def test_full_width_pairs_and_an_object_with_a_last_comma_are_read() -> None:
    pairs = "\uff08\uff11\uff0c\uff12\uff09\uff0c\uff08\uff13\uff0c\uff14\uff09"
    assert parse_answer(pairs).boxes[0].values == (1, 2, 3, 4)
    assert parse_answer('{"bbox_2d": [1, 2, 3, 4], "label": "a",}').boxes == (ParsedBox((1, 2, 3, 4), "a"),)


@pytest.mark.parametrize(
    "written", ["[1., 2, 3]", "[1., 2, 3, 4, 5]", "[1px, 2, 3, 4]", "[1. 2. 3. 4.]", '["a", 2, 3, 4]', "[., 2, 3, 4]"]
)
def test_what_a_person_would_have_to_guess_is_no_box(written: str) -> None:
    assert isinstance(parse_answer(f'{{"bbox_2d": {written}}}'), ParseFailure)
