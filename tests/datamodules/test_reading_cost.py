"""The work of reading an answer: linear in its length, and bounded for 1 MB of any text."""

from __future__ import annotations

import math
import time

import pytest

from datamodules.samples import box_texts
from datamodules.samples.answer_text import ParseFailure, is_well_formed, parse_answer
from datamodules.samples.choice_text import parse_choice
from tests.datamodules.cpu_time import CPU_BOUND, cpu_seconds
from tests.datamodules.samples.hostile_answers import OBJ, ta
from tests.datamodules.samples.test_choice_text import IMAGES, PIECES

# (start, unit repeated n times, end): what makes a careless regex or decoder quadratic or worse.
GROWING = [
    ("", "<think>", ""),
    ("", "</think>", ""),
    ("", "<answer>", ""),
    ("", "<answer ", ""),
    ("", "<think></think><answer>", ""),
    ("", "<", "answer>"),
    ("", " ", "x"),
    ("", "(", ""),
    ("", "(1", ""),
    ("", "(1,2) ", ""),
    ("", "(1,2)", " x"),
    ("", "( ", "1"),
    ("", "1", ",2"),
    ("", "[", ""),
    ("", "[]", ""),
    ("", "[x]", ""),
    ("", "[1,", ""),
    ("", "{", ""),
    ("", '{"', ""),
    ("", '{"a":', ""),
    ("", '{"a":[', ""),
    ("", "[[x]", "]"),
    ("", '"', ""),
    ("", "\\", ""),
    ("", "\n", "x"),
    ("", "```json\n", ""),
    ("", "{'bbox_2d': [1, 2, 3, 4]}", ""),
    ("", '{"bbox_2d": [1, 2, 3, 4]}', ""),
    ("", "[" * 16 + "x" + "]" * 16, ""),
    ("(1,2)", " ", "x"),
    ("(1", " ", "x"),
    ("<answer", " ", "<"),
    ("<box>1", " ", "x"),
    ("", "<box>1 2 3 ", ""),
    ("```json", " ", "x"),
    ("[1,2,3,", "4", "]"),
    ("[", "[1,NaN],", "]"),
]


@pytest.mark.parametrize(("start", "unit", "end"), GROWING, ids=[repr(case) for case in GROWING])
def test_work_grows_linearly_with_length(start: str, unit: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = box_texts.decode

    def counting_decode(text: str, **options):
        nonlocal decoded
        decoded += len(text)
        return decode(text, **options)

    monkeypatch.setattr(box_texts, "decode", counting_decode)

    def seconds(length: int) -> float:
        text = start + unit * (length // len(unit)) + end
        wrapped = f"<think>t</think><answer>```json\n{text}\n```</answer>"
        best = math.inf
        for _ in range(3):
            began = time.process_time()
            for variant in (text, wrapped):
                parse_answer(variant)
                is_well_formed(variant)
            best = min(best, time.process_time() - began)
        return best

    short, long = 2_000, 32_000
    # 16 times the length: linear is 16 times the time, quadratic 256. The constant is for the clock's grain.
    assert seconds(long) <= 80 * max(seconds(short), 1e-4)
    assert decoded <= (box_texts.MAX_DEPTH + 1) * 3 * 4 * (short + long + 200)


WRAPPERS = (
    "{}",
    "<think>t</think><answer>{}</answer>",
    '<think>t</think><answer>{{"bbox_2d": [1, 2, 3, 4], "label": "{}"}}</answer>',
    "<think>{}</think><answer>[1, 2, 3, 4]</answer>",
    "[1, 2, 3, 4] {} [5, 6, 7, 8]",
    "[[[[[[[[[[{}]]]]]]]]]]",
)
MORE = ["[" * 16 + "[1,2,3]" + "]" * 16, "[1., 2, 3, 4], ", "[1., 2, 3, 4 ", "\uff3b", "\uff11", "<box>1 2 3 4</box>"]
MORE += ["Therefore (1,2),(3,4). ", "the answer is [1,2,3,4]. ", "\n\n[1,2,3,4]", "a:\n", "\u0130", "\U0001f600", "1,"]
UNITS = sorted({unit for _, unit, _ in GROWING} | set(MORE))


@pytest.mark.parametrize("unit", UNITS, ids=[repr(unit)[:30] for unit in UNITS])
def test_one_megabyte_of_any_text_is_read_in_bounded_time(unit: str) -> None:
    for wrapper in WRAPPERS:
        text = wrapper.format(unit * (1_000_000 // len(unit)))
        assert cpu_seconds(lambda text=text: parse_answer(text, lenient=True)) <= CPU_BOUND, wrapper
        assert cpu_seconds(lambda text=text: is_well_formed(text)) <= CPU_BOUND, wrapper


def read_first(text: str) -> tuple[float, ...]:
    return parse_answer(text).boxes[0].values


def test_a_text_beyond_the_bounds_is_read_as_stated() -> None:
    assert parse_answer("<think></think>" * 3_000 + f"<answer>{OBJ}</answer>") == ParseFailure("no_answer")
    assert read_first("<think></think>" * 1_000 + f"<answer>{OBJ}</answer>") == (1, 2, 3, 4)
    assert read_first("[]," * 5_000 + OBJ) == (1, 2, 3, 4)  # round the last opening bracket
    assert not is_well_formed(ta('{"bbox_2d": [1, 2, 3, 4], "x": [' + "1," * 5_000 + "1]}"))


@pytest.mark.parametrize(
    "piece", [*PIECES, "(", "A ", "**", "[A", " answer : (((", "(A):\n", "a:\n", "B) ", "\\boxed{"]
)
def test_one_megabyte_of_options_and_cues_is_read_in_bounded_time(piece: str) -> None:
    text = f"[{piece * (1_000_000 // len(piece))} (B)"
    assert cpu_seconds(lambda: parse_choice(text, IMAGES)) <= CPU_BOUND
