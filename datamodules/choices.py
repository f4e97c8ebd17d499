"""Reading the letter of an option from any model text, by stated rules. What benchmarks' own code reads instead stands
in `benchmarks/official_parsers.py`.

The answer is what follows the thinking (`answers.answer_text`); its last MAX_LENGTH characters are read. Lists such as
"(A, B, C, or D)" name the question's options and are passed over. The first rule that finds options decides; where it
finds two, the answer has several and is wrong. What a statement is and does: `conclusions.py`; what names an option,
and which of a letter and a text beside it counts: `option_mentions.py`.

1. The answer is one letter, with or without brackets and punctuation, or is the text of one option.
2. It says so: the last "the answer is …", "I would choose …", "\\boxed{…", "(B) is the best choice".
3. Its last line is one option and nothing else.
4. It concludes: the last "Therefore, …", "Based on …", "this suggests that …" that names one option.
5. It begins with the answer: the first statement names one option. A bare letter there gives way to the option that
   the next statement names by its text.
6. The last statement that names one option, else the first that names any; statements that deny come last.

A statement that it is impossible or difficult to determine the answer, refuses: before it nothing counts, and after it
only rules 2 to 4 do. In a statement, what is denied ("not (B)") never counts, and what the answer is compared with or
reasoned from ("than …", "whereas …", "because …") only where nothing else does. Denying statements conclude nothing.

One option under two letters: where the conclusion has an option's text with a letter in print ("**(A) the second
image**") and the text elsewhere stands with another offered letter that is free ("the second image (B)"), the free letter
counts. Such an answer contradicts itself; published results count its free letter.

An empty answer is wrong. So is a letter that no option has. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.answers import answer_text
from datamodules.conclusions import Statement, statements
from datamodules.option_mentions import Mention, Options, options_of

CHOICE_FAILURES = ("empty", "no_answer", "no_choice", "several_choices", "no_such_choice")
MAX_LENGTH = 8_192

_OPEN, _CLOSE = r"[\s\"'`*(（\[{<$]*+", r"[\s\"'`*)）\]}>.,:;!$]*+"
_ALONE = re.compile(rf"{_OPEN}(?:\\boxed\{{\(?)?([A-Za-z]){_CLOSE}")
_TAGS = re.compile(r"<[/|]?[a-z_]{1,20}[|]?>")  # "</s>", "<|im_end|>"
_LIST = re.compile(r"\(?\b[A-Z](?:, [A-Z]){1,24}(?:,? (?:and|or|&) [A-Z])\b\)?|\(?\b[A-Z](?:, [A-Z]){2,24}\b\)?")


@dataclass(frozen=True)
class ChoiceFailure:
    """Why no option could be read; `kind` is one of CHOICE_FAILURES."""

    kind: str


def parse_choice(text: str, choices: Sequence[str]) -> str | ChoiceFailure:
    """The letter ("A" is choices[0]) that a model text answers, by the rules above. Never raises on model text."""
    answer = answer_text(text)
    if not text.strip():
        return ChoiceFailure("empty")
    if answer is None or not answer.strip():
        return ChoiceFailure("no_answer")
    answer = _TAGS.sub(" ", answer[-MAX_LENGTH:]).strip()
    options = options_of(tuple(choices))
    if alone := _ALONE.fullmatch(answer):
        found = {alone[1].upper()}
    elif named := options.named_by(answer):
        found = {named}
    else:
        found = _conclude(options, statements(_LIST.sub(" ", answer)))
    if len(found) != 1:
        return ChoiceFailure("several_choices" if found else "no_choice")
    letter = found.pop()
    return letter if letter in options.letters else ChoiceFailure("no_such_choice")


def _conclude(options: Options, parts: list[Statement]) -> set[str]:
    """Letters found by rules 2 to 6."""
    said = [part.said() for part in parts]
    refusals = [index for index, part in enumerate(parts) if said[index] is None and part.refuses()]
    counts_from = refusals[-1] + 1 if refusals else 0
    for index in range(len(parts) - 1, counts_from - 1, -1):
        if said[index] is not None and (found := _claims(options, parts[index], said[index])):
            return _one_letter(options, found, parts)
    if len(parts) > max(counts_from, 1):
        found = _claims(options, parts[-1])
        if len(_letters(found)) == 1 and _is_option_alone(options, parts[-1].text):
            return _one_letter(options, found, parts)
    for part in reversed(parts[counts_from:]):
        if part.concludes() and not part.denies():
            found = _claims(options, part)
            if len(_letters(found)) == 1:
                return _one_letter(options, found, parts)
    return set() if refusals else _first_or_last(options, parts)


def _first_or_last(options: Options, parts: list[Statement]) -> set[str]:
    """Rules 5 and 6."""
    claims = [(part.denies(), _claims(options, part)) for part in parts]
    asserted = [found for denies, found in claims if found and not denies]
    first = claims[0][1] if claims and not claims[0][0] else []
    if len(_letters(first)) == 1:
        bare = all(mention.text_of is None and not mention.free for mention in first)
        if bare and len(asserted) > 1 and len(_letters(asserted[1])) == 1 and asserted[1][0].text_of:
            return _letters(asserted[1])
        return _letters(first)
    if not asserted:
        return set().union(*(_letters(found) for _, found in claims))
    last = _letters(asserted[-1])
    return last if len(last) == 1 else _letters(asserted[0])


def _claims(options: Options, part: Statement, span: tuple[int, int] | None = None) -> list[Mention]:
    """What `part` claims within `span`, else in all of it."""
    start, end = span or (0, len(part.text))
    found = options.mentions(part.text[start:end])
    asides = part.asides() if found else []
    plain, compared = [], []
    for mention in found:
        while asides and asides[0][1] <= start + mention.start:
            asides.pop(0)
        if not asides or start + mention.start < asides[0][0]:
            plain.append(mention)
        elif not asides[0][2]:
            compared.append(mention)
    return plain or compared


def _one_letter(options: Options, found: list[Mention], parts: list[Statement]) -> set[str]:
    """The letters of `found`; of an option under two letters the free one."""
    letters = _letters(found)
    owner = found[0].text_of
    if len(letters) == 1 and owner is not None and not any(mention.free for mention in found):
        everywhere = (mention for part in parts for mention in options.mentions(part.text))
        free = {mention.letter for mention in everywhere if mention.free and mention.text_of == owner}
        if len(free) == 1:
            return free
    return letters


def _is_option_alone(options: Options, text: str) -> bool:
    """Whether `text` is a letter, an option's text or both."""
    bare = re.sub(r"[\s\"'`*]*+(?:option|choice)?\s*+[(\[]?[A-Z][)\].:]++", " ", text, count=1)
    return not re.search(r"\w", bare) or options.named_by(bare) is not None


def _letters(found: list[Mention]) -> set[str]:
    return {mention.letter for mention in found}
