"""Parse answers as the official code of the benchmarks does, including its errors, so that results are comparable with
published ones.

This file reproduces the behaviour of the official scripts without copying their code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from datamodules.samples.boxes import Box
from datamodules.samples.option_mentions import option_letters

_INT, _DEC = r"(\d+)", r"(\d+\.\d+)"
# Tried in this order; the first with any match decides. Integers and decimals are never mixed within one box. White
# space after a comma is allowed in all formats except pairs of decimals; before a comma it is never allowed.
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
_BLINK_LETTERS = "ABCDE"  # BLINK questions have at most five options


def extract_box_officially(text: str) -> Box | None:
    """The box that the official MIG-Bench code finds in an answer: four numbers that it treats as xyxy in 0-1, or None.

    Reproduces `extract_bbox` (Migician's eval/utils.py). The first match of the first matching format counts. If the
    text has one box, numbers >= 1 are divided by 1000, so a single [0.0,0.15,1.0,0.5] gets x2 = 0.001. If it has
    several boxes, only numbers > 1 are divided. A box that mixes integers and decimals is not found.
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
    """BLINK's official parser (eval/test_benchmark.py) without its last step, which asks GPT-3.5.

    1. The whole text, including white space, is a letter from A to E, with or without brackets. "(E)" means E even if
       the question has only four options.
    2. Otherwise, words between white space are compared with the options in brackets, such as "(B)". An option counts
       if it is the only one in the last paragraph, or else in the whole text. Repetitions count once. "(B)." and
       "**(B)**" are not such words.
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
    """MMIU's official parser without its last step, which asks GPT-4o-mini: a letter a to n, without . , ( )."""
    stripped = text.strip().strip(".,()").strip()
    return stripped.upper() if re.fullmatch(r"[A-Na-n]", stripped) else None
