"""Which letter an answer means, rule by rule; and the official readings beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.choices import (
    CHOICE_FAILURES,
    ChoiceFailure,
    parse_choice,
    read_choice_as_blink,
    read_choice_as_mmiu,
)

CHOICES = ("the second image", "the third image", "a dark red circle", "a red circle")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # 1: the letter alone
        ("B", "B"),
        ("b", "B"),
        (" (C). ", "C"),
        ("**D**", "D"),
        ("<think>A looks right, or (C).</think><answer>B</answer>", "B"),
        ("<think>t</think> <answer>\n(a)\n</answer>", "A"),
        # 2: said
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("The correct answer is option D, since A is too small.", "D"),
        ("The answer is A? No: the answer is B.", "B"),
        (r"So it is $\boxed{C}$.", "C"),
        ("The answer is **B**, not option A.", "B"),
        ("The answer is B and I am sure", "B"),
        # 3: marked
        ("It must be (B) the third image", "B"),
        ("I choose option C", "C"),
        # 4: leading
        ("B. the third image, while C shows something else", "B"),
        ("D) because A and B differ", "D"),
        # 5: one capital letter alone
        ("I would say B", "B"),
        ("A dog is in B", "B"),
        ("A is right", "A"),
        # 6: an option's text
        ("The Third Image.", "B"),
        ("It shows a dark red circle", "C"),
        ("it is a red circle, I think", "D"),
    ],
)
def test_the_letter_that_an_answer_means(text: str, letter: str) -> None:
    assert parse_choice(text, CHOICES) == letter


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>The answer is B", "no_answer"),
        ("<think>The answer is B</think>", "no_answer"),
        ("<think>B</think><answer></answer>", "no_answer"),
        ("I do not know", "no_choice"),
        ("A dog sleeps", "no_choice"),
        ("(A) or (B)", "several_choices"),
        ("A and B", "several_choices"),
        ("The answer is B or C", "several_choices"),
        ("Answer: **(A)** and **(C)**", "several_choices"),
        ("Answer: A/B", "several_choices"),
        ("the second image or the third image", "several_choices"),
        ("E", "no_such_choice"),
        ("The answer is Z", "no_such_choice"),
    ],
)
def test_what_is_no_answer_is_wrong_and_named(text: str, kind: str) -> None:
    assert parse_choice(text, CHOICES) == ChoiceFailure(kind)


@given(st.text(alphabet=st.sampled_from("AB()[]<>/ \n.:*`answeris\\boxed{}think")))
def test_any_text_gives_a_letter_or_a_known_failure(text: str) -> None:
    found = parse_choice(text, ("x", "y"))
    assert found in ("A", "B") or (isinstance(found, ChoiceFailure) and found.kind in CHOICE_FAILURES)


def test_long_hostile_text_takes_no_time() -> None:
    for piece in ("(", "answer is ", "A ", "\\boxed{", "**", "[A", " answer : ((("):
        parse_choice(piece * 50_000, CHOICES)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("I think (A) at first.\n\nThe best is (B).", "B"),
        ("It is (C), surely", "C"),
        ("(A) or (B)", None),
        ("The answer is B", None),
        ("", None),
    ],
)
def test_blinks_official_reading_without_its_matcher(text: str, letter: str | None) -> None:
    assert read_choice_as_blink(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"), [("b", "B"), ("(C).", "C"), ("D,", "D"), ("n", "N"), ("o", None), ("B: two", None), ("", None)]
)
def test_mmius_official_reading_without_its_matcher(text: str, letter: str | None) -> None:
    assert read_choice_as_mmiu(text) == letter
