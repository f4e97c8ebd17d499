"""Reading the letter of an option from any model text, by stated rules, and as two benchmarks' official code reads it.

The answer is what follows the thinking (`answers.answer_text`). The first rule that finds a letter decides:

1. the answer is one letter, with or without brackets and punctuation: "B", "(b).", "**B**"
2. it says so: the last "answer is B", "answer: (B)", "\\boxed{B}"; "answer is B or C" says two
3. it marks one letter only: "(B)", "[B]", "option B"
4. it begins with a letter and a mark: "B. the second image", "B) …", "B: …"
5. it has one capital letter only that stands alone; "A" or "I" before a word in small letters is a word
   ("A dog"), but not before and, or, is, but, because, since
6. it is the text of one option, or holds the text of one option only

An empty answer is wrong. So is a letter that no option has. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.answers import answer_text

CHOICE_FAILURES = ("empty", "no_answer", "no_choice", "several_choices", "no_such_choice")

_OPEN, _CLOSE = r"[\s\"'`*(\[{<]*+", r"[\s\"'`*)\]}>.,:;!]*+"
_ALONE = re.compile(rf"{_OPEN}([A-Za-z]){_CLOSE}")
_WORD_NEXT = r"(?!\s+(?!(?:and|or|is|but|because|since)\b)[a-z])"  # "A dog" has an article, "A is right" a letter
_AND_ANOTHER = rf"(?:[\"'`*)\]}}>]*+\s*+(?:\b(?:or|and)\b|[/&])\s*+[\"'`*(\[{{<]*+([A-Z])\b{_WORD_NEXT})?"
_SAID = re.compile(
    rf"\b(?i:answer)(?:\s+(?i:is|was|would be|should be))?\s*+[:=]?\s*+(?:(?i:option|choice|letter)\s+)?"
    rf"[\"'`*(\[{{<$]*+(?:\\boxed\{{)?([A-Z])\b{_WORD_NEXT}{_AND_ANOTHER}|\\boxed\{{\(?([A-Z])\)?\}}"
)
_MARKED = re.compile(r"\(([A-Za-z])\)|\[([A-Za-z])\]|\b(?i:option|choice)\s+\(?([A-Z])\b")
_LEADING = re.compile(rf"{_OPEN}([A-Z])[\"'`*]*+[.):]")
_CAPITAL = re.compile(rf"(?<![\w'’.\-])([A-Z])(?![\w'’\-]){_WORD_NEXT}")


@dataclass(frozen=True)
class ChoiceFailure:
    """Why no option could be read; `kind` is one of CHOICE_FAILURES."""

    kind: str


def parse_choice(text: str, choices: Sequence[str]) -> str | ChoiceFailure:
    """The letter ("A" is choices[0]) that a model text answers, by the rules above. Never raises on model text."""
    if not text.strip():
        return ChoiceFailure("empty")
    answer = answer_text(text)
    if answer is None or not answer.strip():
        return ChoiceFailure("no_answer")
    answer = answer.strip()
    offered = [chr(ord("A") + index) for index in range(len(choices))]
    found = _letters(answer)
    if not found:
        named = _named(answer, choices)
        found = {offered[index] for index in named}
    if not found:
        return ChoiceFailure("no_choice")
    if len(found) > 1:
        return ChoiceFailure("several_choices")
    letter = found.pop()
    return letter if letter in offered else ChoiceFailure("no_such_choice")


def _letters(answer: str) -> set[str]:
    """Letters found by the first of rules 1 to 5 that finds any."""
    if alone := _ALONE.fullmatch(answer):
        return {alone[1].upper()}
    if said := list(_SAID.finditer(answer)):
        return set(filter(None, said[-1].groups()))
    if marked := {(m[1] or m[2] or m[3]).upper() for m in _MARKED.finditer(answer)}:
        return marked
    if leading := _LEADING.match(answer):
        return {leading[1]}
    return set(_CAPITAL.findall(answer))


def _named(answer: str, choices: Sequence[str]) -> set[int]:
    """Rule 6. An option inside a longer one that is named too ("red", "dark red") does not count."""
    words = [_words(choice) for choice in choices]
    text = _words(answer)
    if text in words:
        return {words.index(text)} if words.count(text) == 1 else set()
    named = {i for i, choice in enumerate(words) if choice.strip() and choice in text}
    return {i for i in named if not any(words[i] != words[j] and words[i] in words[j] for j in named)}


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.casefold())) + " "


def read_choice_as_blink(text: str) -> str | None:
    """BLINK's official reading, but for its last step, which asks GPT-3.5: a bare letter or "(A)"; else the one "(X)"
    in the last paragraph; else the one "(X)" of the whole text."""
    stripped = text.strip()
    if re.fullmatch(r"[A-Z]|\([A-Z]\)", stripped):
        return stripped.strip("()")
    for part in (stripped.split("\n\n")[-1], stripped):
        found = re.findall(r"\(([A-Z])\)", part)
        if len(found) == 1:
            return found[0]
    return None


def read_choice_as_mmiu(text: str) -> str | None:
    """MMIU's official reading, but for its last step, which asks GPT-4o-mini: a letter a to n once . , ( ) are gone."""
    stripped = text.strip().strip(".,()").strip()
    return stripped.upper() if re.fullmatch(r"[A-Na-n]", stripped) else None
