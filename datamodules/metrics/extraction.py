"""The last step of BLINK's and MMIU's official scoring: a language model says which option an answer picks.

The official code uses this step if its parser finds no letter. This file contains the prompt, in this project's words,
and the parser of the reply. `lightning_modules/predictors/extractor.py` asks the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datamodules.benchmarks.base import WITHOUT_MODEL, Rule
from datamodules.metrics.predictions import Prediction
from datamodules.persistence.files import fingerprint
from datamodules.samples.answer_text import answer_text
from datamodules.samples.option_mentions import option_letters
from datamodules.samples.sample import ImagePart, Sample

EXTRACTED_READERS = ("blink", "mmiu")  # values of `Rule.reader` whose official code finally asks a language model
NO_OPTION = "Z"  # the reply if the answer picks no option; no question has 26 options

_REQUEST = """\
Below are a question about images, its options, and an answer to it. Find out which option the answer picks.

Question:
{question}

Options:
{options}

Answer:
{answer}

Reply with one capital letter and nothing else: the letter of the option that the answer picks, by its letter or by its
meaning. Reply {none} if the answer picks no option or several, refuses, or means something that no option says. Do not
solve the question yourself: only the answer above counts."""
_LETTER = re.compile(r"[\s\"'`*(\[]*([A-Z])(?:[\s\"'`*)\].:,]*|[\"'`*]*[).:\]].*)", re.DOTALL)


@dataclass(frozen=True)
class Unread:
    """A request about an answer without a letter. `key` is a hash of its content, `text` is the prompt."""

    key: str
    text: str
    num_choices: int


def needs_extraction(prediction: Prediction, official: Rule) -> bool:
    """Whether the official code would ask a language model: there is an answer, but no letter was found."""
    asks = official.reader in EXTRACTED_READERS and prediction.refused is None
    return asks and prediction.extracted is None and prediction.official_read is None


def unread(sample: Sample, prediction: Prediction) -> Unread:
    """The request for one answer of BLINK or MMIU."""
    parts = (f"<image {part.image + 1}>\n" if isinstance(part, ImagePart) else part.text for part in sample.messages)
    choices = prediction.answer.choices
    text = extraction_request("".join(parts), choices, prediction.text)
    return Unread(fingerprint(text), text, len(choices))


def extraction_request(question: str, choices: Sequence[str], answer: str) -> str:
    """The prompt that asks which of the `choices` the `answer` picks."""
    options = "\n".join(
        f"({letter}) {choice}" for letter, choice in zip(option_letters(len(choices)), choices, strict=True)
    )
    return _REQUEST.format(question=question.strip(), options=options, answer=answer.strip(), none=NO_OPTION)


def read_extraction(reply: str, num_choices: int) -> str | None:
    """Parse a reply: the letter of an option, or NO_OPTION; None if the reply without its thinking is neither."""
    match = _LETTER.fullmatch((answer_text(reply) or "").strip())
    return match[1] if match and match[1] in (*option_letters(num_choices), NO_OPTION) else None


def with_extractor(official: Rule, model: str | None) -> Rule:
    """The official rule, with the name of the model for the last step."""
    if model is None:
        return official
    named = f"with its last step by the extractor {model}"
    return replace(official, source=official.source.replace(WITHOUT_MODEL, named))
