"""Split a free text into statements, and tell for each whether it states the answer, concludes, refuses or denies.

The parsers of letters (`choice_text.py`) and of boxes (`answer_text.py`) use this file. It looks for words of general
English, not for phrases of one model or one benchmark. All work is linear in the length of the text.

- A statement is a sentence, or a line without a full stop. A line that ends with a colon continues in the next line
  with text, and over all lines of a list whose lines begin with a letter, as in "(A) …".
- A statement states the answer: "the answer is …", "Option: …", "I would choose …", "\\boxed{…". In "… is the best
  choice" the answer stands before these words.
- A statement concludes: "Therefore, …", "So …", "Based on …", "this indicates that …".
- A statement refuses: "it is not possible to determine …", "I cannot tell …".
- A statement denies: "… does not match", "unlikely", "either … or", "on the other hand". A question denies too.
- A part of a statement compares or gives reasons: from "whereas", "than" or "because" to the end of the statement. If
  the statement begins with such a word, the part ends at the next comma.
- A part of a statement is denied: from "not" to the next comma or "but".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

MAX_STATEMENTS = 256  # the last ones of a text; earlier ones are ignored

_LINE = re.compile(r"[^\n]+")
# A sentence ends before a capital, a digit or an opening mark. "B. The dog" at the start of a line stays whole.
_END = re.compile(r"(?<!^.[.])(?<=[.!?])[\"'”’)\]*]{0,4}[ \t]{1,8}(?=[A-Z0-9\"'“‘(\[*{<])", re.MULTILINE)
_LISTED = re.compile(r"[ \t*_-]{0,8}\(?[A-Z][).:]")  # a line of a list of options: "(A) …", "- B. …"
_ENUMERATOR = re.compile(r"[ \t]*+[0-9]{1,3}[.)][ \t]++(?=\S)")  # "2. " at the start of a line

# Statements of the answer: the words before it, and the words after it.
_SAYS = r"(?:is|was|(?:would|should|could|might|may|must|will|can) be|(?:seems|appears) to be|remains|[:=])"
_ANSWER = r"(?:answer|choice|option|solution|selection|response|result|prediction|conclusion)"
_CHOOSE = r"(?:select|choose|pick|go with|opt for|settle on|lean towards?|say|answer)"
_SAID_AFTER = re.compile(
    rf"\b{_ANSWER}\b[\"'*_)]{{0,4}}[ \t]{{0,4}}(?:(?:here|therefore|then|thus) )?{_SAYS}(?!\w)"
    rf"|\b(?:I|we|let us|let's)(?:'d|'ll| would| will| shall| can| must| should| might)? {_CHOOSE}\b|\\boxed\{{",
    re.IGNORECASE,
)
_SAID_BEFORE = re.compile(
    rf"\b{_SAYS} (?:the|a|an|my) (?:[\w-]{{1,20}} ){{0,2}}(?:answer|choice|option)\b", re.IGNORECASE
)
# Conclusions: only at the start of a statement, or after punctuation or "and".
_CONCLUDING = re.compile(
    r"(?:^|[,;:.]|\band)[\s*_#>-]{0,6}(?:therefore|thus|hence|consequently|accordingly|ultimately|finally|so|overall,"
    r"|in (?:conclusion|summary)|to (?:conclude|summarize|sum up)|considering|given|based on|from th(?:is|ese)"
    r"|(?:this|which|it) (?:clearly )?(?:suggests|indicates|means|implies|shows) that"
    r"|(?:indicating|suggesting|meaning) that)(?!\w)",
    re.IGNORECASE,
)
# Refusals.
_DECIDE = r"(?:determine|say|tell|identify|know|choose|decide|select|answer|make|see|be (?:determined|decided))"
_REFUSING = re.compile(
    r"\b(?:(?:not possible|impossible|unable|not able|difficult|hard|challenging) to"
    rf"|cannot|can't|can not|could not|couldn't) (?:\w{{1,20}}ly )?{_DECIDE}\b"
    r"|\b(?:I|we) (?:do not|don't) know\b|\bnot enough (?:information|context)\b",
    re.IGNORECASE,
)
_DENYING = re.compile(
    r"\b(?:no|not|nor|neither|none|cannot|less|least|unlikely|either|incorrect|wrong|lack(?:s|ing)?|unrelated"
    r"|on the other hand|in contrast)\b|n't\b",
    re.IGNORECASE,
)
# Parts of a statement that are denied, or that compare or give reasons; and what can end such a part.
_ASIDE = re.compile(
    r"(?P<denied>\b(?:not|nor|neither)\b|n't\b)"
    r"|\b(?:whereas|while|whilst|although|though|unlike|than|instead of|rather than|as opposed to|in contrast to"
    r"|similar to|compared (?:to|with)|relative to|since|because)\b",
    re.IGNORECASE,
)
_BREAK = re.compile(r"[,;:]|\bbut\b", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """One statement of a text."""

    text: str
    start: int  # its place [start, end) in the whole text
    end: int

    def said(self) -> tuple[int, int] | None:
        """[from, to) in `self.text`: the place of the answer that the statement states; None if it states none."""
        after = [found.end() for found in _SAID_AFTER.finditer(self.text)]
        if after:
            return after[-1], len(self.text)
        before = [found.start() for found in _SAID_BEFORE.finditer(self.text)]
        return (0, before[-1]) if before else None

    def concludes(self) -> bool:
        """Whether the statement draws a conclusion ("Therefore, …")."""
        return _CONCLUDING.search(self.text) is not None

    def refuses(self) -> bool:
        """Whether the statement says that the answer cannot be determined."""
        return _REFUSING.search(self.text) is not None

    def denies(self) -> bool:
        """Whether the statement denies something, or is a question."""
        return self.text.rstrip().endswith("?") or _DENYING.search(self.text) is not None

    def asides(self) -> list[tuple[int, int, bool]]:
        """(from, to, denied) of the asides in order: parts that are denied, or that compare or give reasons."""
        found, done = [], 0
        for match in _ASIDE.finditer(self.text):
            if match.start() < done:
                continue  # inside the aside before
            denied = match["denied"] is not None
            leading = not self.text[: match.start()].strip(" \t\n*_#>-")
            # "Because it rains, it is (B)" ends at the comma; "it is (B), because …" goes on to the end.
            stop = _BREAK.search(self.text, match.end()) if denied or leading else None
            done = len(self.text) if stop is None else stop.start()
            found.append((match.start(), done, denied))
        return found


def statements(text: str) -> list[Statement]:
    """The statements of `text` in order, without list numbers ("2. ") at the start of a line."""
    spans: list[tuple[int, int]] = []
    open_colon = listing = False  # the line before ends with a colon; the line before is in a list after a colon
    for line in _LINE.finditer(text):
        if not line[0].strip():
            continue
        number = _ENUMERATOR.match(text, line.start(), line.end())
        start = line.start() if number is None else number.end()
        cuts = [start, *(mark.end() for mark in _END.finditer(text, start, line.end())), line.end()]
        listing = (open_colon or listing) and _LISTED.match(text, start, line.end()) is not None
        if spans and (open_colon or listing):
            cuts[0] = spans.pop()[0]  # join this line to the statement before
        spans += pairwise(cuts)
        open_colon = line[0].rstrip(" \t\r*_").endswith(":")
    return [Statement(text[start:end], start, end) for start, end in spans[-MAX_STATEMENTS:]]
