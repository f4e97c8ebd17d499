"""Random hostile answers: no reader raises, and the format reward agrees with the paper's sentence on each.

The short run is for every day. The long one has as many answers as the audit that found no exception before.
"""

from __future__ import annotations

import math
import random

import pytest

from datamodules.metrics.official_parsers import extract_box_officially, read_choice_as_blink, read_choice_as_mmiu
from datamodules.samples.answer_text import FAILURE_KINDS, ParseFailure, is_well_formed, parse_answer, render_answer
from datamodules.samples.choice_text import CHOICE_FAILURES, ChoiceFailure, parse_choice
from tests.datamodules.samples.hostile_answers import CASES, FENCED, OBJ, OTHER
from tests.datamodules.samples.test_choice_text import IMAGES
from tests.datamodules.samples.test_choice_text import PIECES as CUES
from tests.datamodules.test_format_tags import VALID, follows_the_papers_format

SHORT = [text for text, _, _ in CASES if len(text) < 600]
GRAMMAR = """<think> </think> <answer> </answer> < > ```json ``` { } [ ] " \\ , : "bbox_2d" "label" 1 2.5 -3 1e999 NaN
null true (1,2) ( [1,2,3,4] 10. +1 '"""
WORDS = [*GRAMMAR.split(), "\uff3b", "\uff11", "\u0661", "\x00", "\ud800", "\u0130"]
PIECES = [*WORDS, *CUES, OBJ, OTHER, FENCED, " ", "\n", "\n\n"]


def hostile_text(rng: random.Random) -> str:
    """Pieces of the grammar in a row, or a hostile, rendered or concluding answer with some of it replaced."""
    if rng.random() < 0.5:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 40)))
    rendered = render_answer([rng.randint(-5, 9) for _ in range(4)], rng.choice(WORDS), rng.choice(["", "so it is"]))
    text = rng.choice([rng.choice(SHORT), VALID, rendered, f"It is at {OTHER}. So the answer is {OBJ}"])
    for _ in range(rng.randint(0, 5)):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice([0, 0, 1, 2, 5, 20]))
        text = text[:start] + rng.choice([*PIECES, ""]) + text[end:]
    return text


def check(text: str) -> bool:
    """What holds for any text; whether it earns the format reward."""
    well_formed = is_well_formed(text)
    assert well_formed == follows_the_papers_format(text), text
    for lenient in (False, True):
        parsed = parse_answer(text, lenient)
        if isinstance(parsed, ParseFailure):
            assert parsed.kind in FAILURE_KINDS and not well_formed, text
        else:
            assert parsed.boxes and all(math.isfinite(value) for box in parsed.boxes for value in box.values), text
    letter = parse_choice(text, IMAGES)
    assert letter.kind in CHOICE_FAILURES if isinstance(letter, ChoiceFailure) else letter in "AB", text
    assert read_choice_as_blink(text, IMAGES) in (None, *"ABCDE")
    assert read_choice_as_mmiu(text) in (None, *"ABCDEFGHIJKLMN")
    box = extract_box_officially(text)
    assert box is None or len(box) == 4
    return well_formed


@pytest.mark.parametrize("count", [4_000, pytest.param(1_200_000, marks=pytest.mark.slow)])
def test_no_reader_raises_on_hostile_answers(count: int) -> None:
    rng = random.Random(count)
    well_formed = sum(check(hostile_text(rng)) for _ in range(count))
    assert well_formed >= count / 100
