"""The answer grammar: round trips, hostile texts, fuzzing, strictness and linear time."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.samples.answer_text import (
    FAILURE_KINDS,
    ParsedAnswer,
    ParseFailure,
    has_answer_tags,
    is_well_formed,
    parse_answer,
    render_answer,
)
from datamodules.samples.box_texts import ParsedBox
from tests.datamodules.samples.hostile_answers import CASES

NUMBERS = st.integers(-10, 10_000) | st.floats(0, 1).map(lambda value: round(value, 3))
VALID = render_answer((1, 2, 3, 4), "red circle", "It is in the second image.")
# Pieces of which model text is made; random sequences of them reach far deeper than random characters.
WORDS = """<think> </think> <answer> </answer> < > ```json ``` { } [ ] " \\ , : "bbox_2d" "label" 1 2.5 -3 1e999 NaN
true null (1,2) ( [1,2,3,4] {"bbox_2d":[1,2,3,4]} text \u0661 \x00 \ud800"""
PIECES = st.sampled_from([*WORDS.split(), " ", "\n"])
thoughts = st.text().filter(lambda text: not has_answer_tags(text))


def check_invariants(text: str) -> None:
    """What must hold for every string whatever."""
    parsed, strict = parse_answer(text), is_well_formed(text)
    if isinstance(parsed, ParseFailure):
        assert parsed.kind in FAILURE_KINDS
        assert not strict
        return
    assert parsed.boxes
    for box in parsed.boxes:
        assert len(box.values) == 4
        assert all(type(value) is float and math.isfinite(value) for value in box.values)
        assert box.label is None or isinstance(box.label, str)
    if strict:
        x1, y1, x2, y2 = parsed.boxes[0].values
        assert x1 < x2 and y1 < y2
        assert text.count("<think>") == text.count("</answer>") == 1


def test_there_are_at_least_200_distinct_hostile_texts_that_cover_every_failure() -> None:
    assert len({text for text, _, _ in CASES}) == len(CASES) >= 200
    assert {outcome for _, outcome, _ in CASES if isinstance(outcome, str)} == set(FAILURE_KINDS)
    assert sum(reward for _, _, reward in CASES) >= 20


@pytest.mark.parametrize(("text", "outcome", "reward"), CASES, ids=[f"{i}" for i in range(len(CASES))])
def test_hostile_text(text: str, outcome: str | tuple[float, ...], reward: int) -> None:
    parsed = parse_answer(text)
    found = parsed.kind if isinstance(parsed, ParseFailure) else parsed.boxes[0].values
    assert found == outcome, repr(text[:300])
    assert is_well_formed(text) == bool(reward), repr(text[:300])
    check_invariants(text)


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), st.text(), st.none() | thoughts)
@example((1, 2, 3, 4), '</answer><think>```\n{["\\', "a < b")
@example((1, 2, 3, 4), "\x1f\ud800\u2028", "")
def test_what_is_rendered_is_parsed_back(values, label: str, thinking: str | None) -> None:
    text = render_answer(values, label, thinking)
    assert parse_answer(text) == ParsedAnswer((ParsedBox(tuple(values), label),), thinking)
    assert is_well_formed(text) == (thinking is not None and values[0] < values[2] and values[1] < values[3])
    check_invariants(text)


def test_the_rendered_text_is_the_documented_one() -> None:
    fenced = '```json\n{"bbox_2d": [1, 2, 3, 4], "label": "a"}\n```'
    assert render_answer([1, 2, 3, 4], "a", None) == fenced
    assert render_answer([1, 2, 3, 4], "a", "why") == f"<think>why</think><answer>{fenced}</answer>"
    assert '[0.125, 0.5, 1, 1.0], "label": "été"' in render_answer([0.125, 0.5, 1, 1.0], "été", None)


@pytest.mark.parametrize(
    "values", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, math.nan], [1, 2, 3, math.inf], [1, 2, 3, True]]
)
def test_numbers_that_are_no_box_are_not_rendered(values) -> None:
    with pytest.raises(ValueError, match="four finite numbers"):
        render_answer(values, "a", "t")


@pytest.mark.parametrize("thinking", ["a </think> b", "<answer>", "<THINK >", '<answer id="1">'])
def test_thinking_that_holds_a_tag_is_not_rendered(thinking: str) -> None:
    with pytest.raises(ValueError, match="tags"):
        render_answer([1, 2, 3, 4], "a", thinking)


@given(st.text(st.characters()))
def test_any_text_has_an_outcome(text: str) -> None:
    check_invariants(text)


@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_mixture_of_the_grammars_pieces_has_an_outcome(text: str) -> None:
    check_invariants(text)


@given(st.data())
def test_any_mutation_of_a_valid_answer_has_an_outcome(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([VALID, *(case[0] for case in CASES if len(case[0]) < 500)]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + data.draw(PIECES | st.text(max_size=3)) + text[end:]
    check_invariants(text)


@pytest.mark.parametrize("position", range(len(VALID)))
def test_deleting_any_character_never_raises_and_tags_stay_required(position: int) -> None:
    text = VALID[:position] + VALID[position + 1 :]
    check_invariants(text)
    spans = [match.span() for match in re.finditer(r"</?(?:think|answer)>", VALID)]
    if any(start <= position < end for start, end in spans):
        assert not is_well_formed(text)


@pytest.mark.parametrize("position", range(len(VALID)))
def test_a_text_cut_short_earns_no_format_reward(position: int) -> None:
    assert not is_well_formed(VALID[:position])
    check_invariants(VALID[:position])


def test_boxes_come_in_the_order_written_with_their_labels() -> None:
    written = [{"bbox_2d": [i, i, i + 1, i + 1], "label": f"object {i}"} for i in range(5)]
    parsed = parse_answer(f"```json\n{json.dumps(written)}\n```")
    assert [box.label for box in parsed.boxes] == [item["label"] for item in written]
    assert [box.values[0] for box in parsed.boxes] == [0, 1, 2, 3, 4]
    assert parsed.thinking is None


def test_a_list_cut_short_keeps_its_complete_boxes() -> None:
    text = json.dumps([{"bbox_2d": [1, 2, 3, 4], "label": "a"}] * 3)
    cut = text[: text.rindex("{") + 12]
    assert parse_answer(cut).boxes == (ParsedBox((1, 2, 3, 4), "a"),) * 2


def test_boxes_in_the_thinking_are_not_the_answer() -> None:
    text = '<think>first {"bbox_2d": [9, 9, 99, 99]}</think><answer>[1, 2, 3, 4]</answer>'
    parsed = parse_answer(text)
    assert parsed.boxes[0].values == (1, 2, 3, 4)
    assert parsed.thinking == 'first {"bbox_2d": [9, 9, 99, 99]}'
    assert parse_answer('<think>first {"bbox_2d": [9, 9, 99, 99]}') == ParseFailure("no_answer")


@pytest.mark.parametrize("between", [",\n", "\n", ", \r\n"])
def test_words_in_lines_of_json_are_no_conclusion_but_words_after_them_are(between: str) -> None:
    first, second = '{"label": "so the answer is: x", "bbox_2d": [1, 2, 3, 4]}', '{"bbox_2d": [5, 6, 7, 8]}'
    assert [box.values for box in parse_answer(between.join([first, first])).boxes] == [(1, 2, 3, 4)] * 2
    assert [box.values for box in parse_answer(f"{first} so the answer is {second}{between}").boxes] == [(5, 6, 7, 8)]


@pytest.mark.parametrize(
    "text", ["<", "<think", "<a>", "<answer>", "<think></think>", "<x></x><answer></answer>", "<|", "|"]
)
def test_starting_like_a_tag_earns_no_format_reward(text: str) -> None:
    assert not is_well_formed(text)


def test_text_without_tags_and_empty_text_earn_nothing() -> None:
    for text in ("", " ", "the red circle"):
        assert isinstance(parse_answer(text), ParseFailure)
        assert not is_well_formed(text)


def test_numbers_stay_as_written_whatever_their_size() -> None:
    """No scale is guessed: 1, mixed integers and floats, and pixels above 1000 all pass through."""
    for values in ([0, 0.15, 1, 0.5], [0.0, 0.15, 1.0, 0.5], [300, 400, 1500, 1600], [1, 1, 1000, 1000]):
        assert parse_answer(json.dumps({"bbox_2d": values})).boxes[0].values == tuple(values)
        assert parse_answer(json.dumps([{"bbox_2d": values}] * 2)).boxes[1].values == tuple(values)


def test_nesting_beyond_pythons_recursion_limit_is_a_plain_failure() -> None:
    for text in ("[" * 200_000 + "]" * 200_000, '{"bbox_2d": ' * 50_000 + "1" + "}" * 50_000):
        assert isinstance(parse_answer(text), ParseFailure)
        assert not is_well_formed(f"<think></think><answer>{text}</answer>")
