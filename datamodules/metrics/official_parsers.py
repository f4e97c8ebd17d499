"""How benchmarks' own code reads an answer, kept with its faults, so that numbers compare with published ones.

Written from the behaviour of the official scripts; none of their code is here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from datamodules.samples.boxes import Box
from datamodules.samples.option_mentions import option_letters

_INT, _DEC = r"(\d+)", r"(\d+\.\d+)"
# Tried in this order; the first with any match decides. Integers and decimals are never mixed within one box. White
# space after a comma is allowed in all forms but the pairs of decimals, and before a comma in none.
_BOX_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"\({_INT},\s*{_INT}\),\s*\({_INT},\s*{_INT}\)",
        rf"\[{_DEC},\s*{_DEC},\s*{_DEC},\s*{_DEC}\]",
        rf"\({_DEC},{_DEC}\),\({_DEC},{_DEC}\)",
        rf"\({_DEC},\s*{_DEC},\s*{_DEC},\s*{_DEC}\)",
        rf"\[{_INT},\s*{_INT},\s*{_INT},\s*{_INT}\]",
        rf"<box>{_INT} {_INT} {_INT} {_INT}</box>",
    )
)
_BLINK_LETTERS = "ABCDE"  # the most options that a BLINK question has


def extract_box_officially(text: str) -> Box | None:
    """The box that the official MIG-Bench code reads from an answer: four numbers that it takes for unit xyxy, or None.

    From the behaviour of `extract_bbox` (Migician's eval/utils.py). The first box of the first form that matches
    counts. Numbers are divided by 1000 from 1 on when the text holds one box, and only above 1 when it holds several: a
    lone [0.0,0.15,1.0,0.5] gets x2 = 0.001. A box that mixes integers with decimals is not seen.
    """
    for form in _BOX_FORMS:
        found = form.finditer(text)
        if first := next(found, None):
            alone = next(found, None) is None
            x1, y1, x2, y2 = (
                number / 1000 if number > 1 or (number == 1 and alone) else number
                for number in map(float, first.groups())
            )
            return x1, y1, x2, y2
    return None


def read_choice_as_blink(text: str, choices: Sequence[str]) -> str | None:
    """BLINK's official reading (eval/test_benchmark.py) without its last step, which asks GPT-3.5.

    1. The whole text, white space included, is a letter from A to E or such a letter in brackets, whatever the question
       offers: "(E)" is E with four options too.
    2. Else words between white space are compared with the question's own options in brackets, as a set: the only one
       in the last paragraph ("\\n\\n" ends one), else the only one of the whole text. "(B)." and "**(B)**" are no such
       words, and "(B) because (B)" has one.
    """
    bare = text.removeprefix("(").removesuffix(")") if len(text) == 3 else text
    if len(bare) == 1 and bare in _BLINK_LETTERS and text in (bare, f"({bare})"):
        return bare
    offered = {f"({letter})" for letter in option_letters(len(choices))}
    for part in (text.split("\n\n")[-1], text):
        found = offered.intersection(part.split())
        if len(found) == 1:
            return found.pop()[1]
    return None


def read_choice_as_mmiu(text: str) -> str | None:
    """MMIU's official reading without its last step, which asks GPT-4o-mini: a letter a to n once . , ( ) are gone."""
    stripped = text.strip().strip(".,()").strip()
    return stripped.upper() if re.fullmatch(r"[A-Na-n]", stripped) else None
