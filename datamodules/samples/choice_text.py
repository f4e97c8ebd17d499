"""Read the letter of an option from any model text, by stated rules. The benchmarks' own parsers are in
`metrics/official_parsers.py`.

The answer is the text after the thinking (`answer_text.answer_text`); its last MAX_LENGTH characters are read. Lists
such as "(A, B, C, or D)" repeat the options of the question and are ignored. The first rule that finds options decides.
If it finds two options, the answer is wrong ("several_choices"). `conclusions.py` defines which statements state,
conclude, refuse and deny. `option_mentions.py` defines which words name an option, and whether a letter or the text
beside it counts.

1. The answer is one letter, with or without brackets and punctuation, or it is the text of one option.
2. A statement states the answer: the last "the answer is …", "I would choose …", "\\boxed{…", "(B) is the best choice".
3. The last line is one option and nothing else.
4. A statement concludes: the last "Therefore, …", "Based on …", "this suggests that …" that names one option.
5. The first statement names one option. If it is a bare letter and the next statement names an option by its text, that
   option counts.
6. The last statement that names options, if it names one; else the first one. Statements that deny count only if no
   other statement names an option.

A statement refuses if it says that the answer is impossible or difficult to determine. Text before it does not count,
and only rules 2 to 4 apply to the text after it. Inside a statement, a denied part ("not (B)") never counts. A part
that compares or gives reasons ("than …", "whereas …", "because …") counts only if no other part names an option. A
statement that denies is never a conclusion.

An answer can give one option two letters: its conclusion has the option's text with a letter ("**(A) the second
image**"), and elsewhere the same text has another letter that stands free ("the second image (B)"). Such an answer
contradicts itself. The free letter counts, because published results count it.

An empty answer is wrong, and so is a letter that no option has. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.samples.answer_text import answer_text
from datamodules.samples.conclusions import Statement, statements
from datamodules.samples.option_mentions import Mention, Options, options_of

CHOICE_FAILURES = ("empty", "no_answer", "no_choice", "several_choices", "no_such_choice")
MAX_LENGTH = 6_144  # characters

# Brackets, quotes and markdown that may be before or after a letter.
_OPEN, _CLOSE = r"[\s\"'`*(（\[{<$]*+", r"[\s\"'`*)）\]}>.,:;!$]*+"
_ALONE = re.compile(rf"{_OPEN}(?:\\boxed\{{\(?)?([A-Za-z]){_CLOSE}")
_TAGS = re.compile(r"<[/|]?[a-z_]{1,20}[|]?>")  # "</s>", "<|im_end|>"
# "(A, B, C, or D)" and "A, B, C": the options of the question, not an answer.
_LIST = re.compile(r"\(?\b[A-Z](?:, [A-Z]){1,24}(?:,? (?:and|or|&) [A-Z])\b\)?|\(?\b[A-Z](?:, [A-Z]){2,24}\b\)?")


@dataclass(frozen=True)
class ChoiceFailure:
    """The reason why no option could be read; `kind` is one of CHOICE_FAILURES."""

    kind: str


def parse_choice(text: str, choices: Sequence[str]) -> str | ChoiceFailure:
    """The letter that a model text answers, by the rules above; "A" is choices[0]. No model text raises an error."""
    answer = answer_text(text)
    if not text.strip():
        return ChoiceFailure("empty")
    if answer is None or not answer.strip():
        return ChoiceFailure("no_answer")
    answer = _TAGS.sub(" ", answer[-MAX_LENGTH:]).strip()
    options = options_of(tuple(choices))
    # Rule 1, then the rules that look at the statements of the answer.
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
    """The letters that rules 2 to 6 find."""
    said = [part.said() for part in parts]
    # Only text after the last refusal counts. A statement that states an answer does not refuse.
    refusals = [index for index, part in enumerate(parts) if said[index] is None and part.refuses()]
    counts_from = refusals[-1] + 1 if refusals else 0
    # Rule 2: the last statement that states the answer.
    for index in range(len(parts) - 1, counts_from - 1, -1):
        if said[index] is not None and (found := _claims(options, parts[index], said[index])):
            return _one_letter(options, found, parts)
    # Rule 3: the last line is one option.
    if len(parts) > max(counts_from, 1):
        found = _claims(options, parts[-1])
        if len(_letters(found)) == 1 and _is_option_alone(options, parts[-1].text):
            return _one_letter(options, found, parts)
    # Rule 4: the last statement that concludes.
    for part in reversed(parts[counts_from:]):
        if part.concludes() and not part.denies():
            found = _claims(options, part)
            if len(_letters(found)) == 1:
                return _one_letter(options, found, parts)
    return set() if refusals else _first_or_last(options, parts)


def _first_or_last(options: Options, parts: list[Statement]) -> set[str]:
    """The letters that rules 5 and 6 find."""
    claims = [(part.denies(), _claims(options, part)) for part in parts]
    asserted = [found for denies, found in claims if found and not denies]
    # Rule 5: the first statement.
    first = claims[0][1] if claims and not claims[0][0] else []
    if len(_letters(first)) == 1:
        # A bare "A" may be the article, so an option's text in the next statement is the safer reading.
        bare = all(mention.text_of is None and not mention.free for mention in first)
        if bare and len(asserted) > 1 and len(_letters(asserted[1])) == 1 and asserted[1][0].text_of:
            return _letters(asserted[1])
        return _letters(first)
    # Rule 6: the last statement that names options, else the first one.
    if not asserted:
        return set().union(*(_letters(found) for _, found in claims))
    last = _letters(asserted[-1])
    return last if len(last) == 1 else _letters(asserted[0])


def _claims(options: Options, part: Statement, span: tuple[int, int] | None = None) -> list[Mention]:
    """The options that the statement `part` claims, within `span` if that is given.

    The first of these four that finds options counts: marked letters and texts outside all asides, bare capitals
    outside all asides, marked letters and texts outside denied parts, bare capitals outside denied parts.
    """
    start, end = span or (0, len(part.text))
    text = part.text[start:end]
    marked, capitals = options.mentions(text), options.capitals(text)
    if not marked and not capitals:
        return []
    asides = part.asides()

    def outside(mentions: list[Mention], which: Sequence[tuple[int, int, bool]]) -> list[Mention]:
        # Both lists are sorted by place, so one pass over them is enough.
        kept, index = [], 0
        for mention in mentions:
            while index < len(which) and which[index][1] <= start + mention.start:
                index += 1
            if index == len(which) or start + mention.start < which[index][0]:
                kept.append(mention)
        return kept

    denied = [aside for aside in asides if aside[2]]
    for mentions, which in ((marked, asides), (capitals, asides), (marked, denied), (capitals, denied)):
        if found := outside(mentions, which):
            return found
    return []


def _one_letter(options: Options, found: list[Mention], parts: list[Statement]) -> set[str]:
    """The letters of `found`; if one option has two letters, the letter that stands free."""
    letters = _letters(found)
    owner = found[0].text_of
    if len(letters) == 1 and owner is not None and not any(mention.free for mention in found):
        everywhere = (mention for part in parts for mention in options.mentions(part.text))
        free = {mention.letter for mention in everywhere if mention.free and mention.text_of == owner}
        if len(free) == 1:
            return free
    return letters


def _is_option_alone(options: Options, text: str) -> bool:
    """Whether `text` is a letter, the text of an option, or both."""
    bare = re.sub(r"[\s\"'`*]*+(?:option|choice)?\s*+[(\[]?[A-Z][)\].:]++", " ", text, count=1)
    return not re.search(r"\w", bare) or options.named_by(bare) is not None


def _letters(found: list[Mention]) -> set[str]:
    return {mention.letter for mention in found}
