"""The format reward against the paper's sentence, read once more without the grammar of the project."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.samples.answer_text import is_well_formed, render_answer
from tests.datamodules.samples.hostile_answers import CASES, FENCED, OBJ

VALID = render_answer((1, 2, 3, 4), "red circle", "It is in the second image.")


def follows_the_papers_format(text: str) -> bool:
    """Paper §3.2: 'the model output must follow the format: "<think>...</think><answer>...</answer>"', and the box is
    'in the correct JSON format'. Read literally, character by character, without the grammar of the project.

    The four tags stand there once each, in this order, with white space at most before, between and after them. A tag
    is "<", "/" or not, the word in any case, then ">" or white space and anything without "<" and ">" up to ">": one
    that is written otherwise than in the paper breaks the format.
    """
    tags, place = [], 0
    while place < len(text):
        if text[place] != "<":
            place += 1
            continue
        end = place + 1
        while end < len(text) and text[end] not in "<>":
            end += 1
        inside = text[place + 1 : end].removeprefix("/")
        closed = end < len(text) and text[end] == ">"
        name = "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in inside)
        for word in ("think", "answer"):
            rest = name.removeprefix(word)
            if closed and name.startswith(word) and (not rest or rest[0] in " \t\n\r\f\v"):
                tags.append((text[place : end + 1], place, end + 1))
        place = end
    if [tag for tag, _, _ in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    (_, begin, _), (_, _, thought), (_, opening, answering), (_, closing, end) = tags
    if (text[:begin] + text[thought:opening] + text[end:]).strip():
        return False
    body = text[answering:closing].strip()
    if body.startswith("```") and body.endswith("```") and len(body) >= 6:
        first, newline, body = body[3:-3].partition("\n")
        if first.removeprefix("json").strip(" \t\r") or not newline:
            return False

    def refuse(name: str) -> None:
        raise ValueError(name)

    keys: list[list[str]] = []

    def pairs(found: list[tuple]) -> dict:
        keys.append([key for key, _ in found])
        return dict(found)

    try:
        value = json.loads(body, parse_constant=refuse, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or any(len(set(names)) < len(names) for names in keys):
        return False
    box = value.get("bbox_2d")
    if not isinstance(box, list) or len(box) != 4 or any(type(item) not in (int, float) for item in box):
        return False
    if not all(abs(item) <= sys.float_info.max for item in box) or not isinstance(value.get("label", ""), str):
        return False
    return box[0] < box[2] and box[1] < box[3]


TAGS = """< > / think answer think> <think> </think> <answer> </answer> <Think> </ANSWER> <thinking> x"""
ODD_TAGS = ["<answer\n>", "<think >", '<answer a="1">', "<think a<b>", "</think\u00a0>", "<thin\u212a>"]
TAG_PIECES = st.sampled_from([*TAGS.split(), *ODD_TAGS, " ", "\n", OBJ, FENCED])


@given(st.lists(TAG_PIECES, max_size=12).map("".join))
@example(VALID)
@example("<think>a <answer b</think><answer>" + OBJ + "</answer>")
def test_a_tag_is_that_of_the_papers_sentence(text: str) -> None:
    assert is_well_formed(text) == follows_the_papers_format(text)


@given(st.lists(TAG_PIECES, max_size=4).map("".join), st.lists(TAG_PIECES, max_size=3).map("".join), st.data())
def test_a_tag_is_that_of_the_papers_sentence_inside_whole_answers(thought: str, around: str, data) -> None:
    body = data.draw(st.sampled_from([OBJ, FENCED, f" {OBJ}\n", f"{OBJ}{around}", f"{around}{FENCED}"]))
    outside = data.draw(st.sampled_from(["", " ", "\n", around]))
    text = f"{outside}<think>{thought}</think>{outside}<answer>{body}</answer>"
    assert is_well_formed(text) == follows_the_papers_format(text)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_papers_sentence_agrees_on_the_hostile_texts(index: int) -> None:
    text, _, reward = CASES[index]
    if len(text) < 100_000:
        assert follows_the_papers_format(text) == bool(reward)
