"""Find the places where a text names options: by a letter ("(B)", "option B", "B.") or by an option's own text ("the
third image").

Rules of one mention:

- Texts are compared word by word, without case and without a leading article. Numbers are compared by value: "four",
  "4" and "04" are equal. A text that two options share names neither. "dark red circle" does not name the option "red
  circle".
- A letter beside an option's text is one mention together with it: "(B) the third image", "the third image (B)". If the
  two name different options, the text counts. Exception: the letter counts if an option has it and it stands free,
  which means that "(B)" has white space on both sides.
- All options may end in the same word. A letter after this word then names something else: in "the first image (A)",
  where only the second and the third image can be chosen, "(A)" labels the image and is no answer.
- A capital alone counts only if nothing else in the claim names an option. "A" and "I" before a small letter are words
  ("A dog"), but not before words that cannot follow an article ("A is", "A and", "A in").
- A letter that no option has counts only if the text names no option.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

# "A" and "I" before a small letter are words, but not before one of these words, which cannot follow an article.
_NO_ARTICLE = "and|or|is|are|was|were|has|have|does|can|would|but|because|since|at|by|for|from|in|of|on|to|which|with"
_NO_WORD = rf"(?!\s+(?!(?:{_NO_ARTICLE})\b)[a-z])"
# A letter with a mark that shows that it is an option: "(B)", "[B]", "option B", "B)", "B." at the start of a line.
_MARK = re.compile(
    r"(?<!\S)\((?P<free>[A-Z])\)(?!\S)"
    r"|\((?:(?i:choice|option|answer) )?(?P<round>[A-Za-z])\)|\[(?P<square>[A-Za-z])\]"
    r"|\b(?i:option|choice|answer|letter)\s{1,4}[\"'`*(]{0,4}(?P<named>[A-Z])\b(?!['’])"
    r"|(?<![\w(])(?P<closed>[A-Z])\)|^[\s\"'`*]{0,8}(?P<leading>[A-Z])[\"'`*]{0,4}(?:[.:]|\s*$)",
    re.MULTILINE,
)
_CAPITAL = re.compile(rf"(?<![A-Za-z0-9_'’.\-])([B-HJ-Z]|[AI]{_NO_WORD})(?![A-Za-z0-9_'’\-])")
_BESIDE = re.compile(r"[\s\"'`*.:)\-–—,]{0,6}")  # between a letter and the text that it labels
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ARTICLES = ("the", "a", "an")
# Models that know Chinese sometimes answer in Chinese. A text that is one such word names the option with this meaning.
_CHINESE = {
    "左": "left", "右": "right", "上": "up", "下": "down", "前": "front", "后": "back", "中": "middle",
    "是": "yes", "否": "no", "对": "true", "错": "false",
    "零": "0", "一": "1", "二": "2", "两": "2", "三": "3", "四": "4", "五": "5", "六": "6", "七": "7", "八": "8",
    "九": "9", "十": "10",
}  # fmt: skip
_CHINESE_WORD = re.compile(rf"([{''.join(_CHINESE)}])[边侧面方]?")


@dataclass(frozen=True)
class Mention:
    """One place that names an option.

    Example: in "the second image (B)" at place 10, where the option A is "the second image", the mention is
    Mention("B", 10, free=True, text_of="A").
    """

    letter: str  # the option that counts
    start: int  # place in the text
    free: bool = False  # named by "(B)" with white space on both sides
    text_of: str | None = None  # the option whose own text stands here


def option_letters(count: int) -> list[str]:
    """The letters of `count` options: A, B, C, …"""
    return [chr(ord("A") + index) for index in range(count)]


class Options:
    """The options of one question, A, B, … in order."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.letters = option_letters(len(choices))
        words = [_words(choice) for choice in choices]
        self._texts = [" ".join(parts) for parts in words]
        # One regex finds the texts of all options; group k belongs to the option self._owners[k - 1].
        own = [(parts, letter) for parts, letter in zip(words, self.letters, strict=True) if self._owner(parts)]
        own.sort(key=lambda pair: -len(pair[0]))  # longer texts first: "dark red circle" before "red circle"
        self._owners = [letter for _, letter in own]
        self._named = re.compile("|".join(_pattern(parts) for parts, _ in own), re.IGNORECASE) if own else None
        # The word in which all options end, if there is one.
        ends = {parts[-1] for parts in words if len(parts) > 1}
        shared = len(ends) == 1 and all(len(parts) > 1 for parts in words)
        self._shared = re.compile(rf"\b{re.escape(ends.pop())}[\s*\"']{{1,3}}$", re.IGNORECASE) if shared else None

    def named_by(self, text: str) -> str | None:
        """The option whose text is all of `text`, or None."""
        parts = _words(text[:2000])
        if len(parts) == 1 and (chinese := _CHINESE_WORD.fullmatch(parts[0])):
            parts = [_CHINESE[chinese[1]]]
        return self._owner(parts)

    def mentions(self, text: str) -> list[Mention]:
        """The mentions in `text` by a marked letter or by an option's text, in order of their place.

        If there are none, the mentions of letters that no option has.
        """
        texts = [] if self._named is None else [*self._named.finditer(text)]
        starts = [found.start() for found in texts]
        labelled: set[int] = set()  # indices into `texts` that have a letter beside them
        offered, unknown = [], []
        # 1. Marked letters, each together with the option's text beside it.
        for mark in _MARK.finditer(text):
            letter = mark[mark.lastgroup].upper()
            free = mark.lastgroup == "free" and letter in self.letters
            after = bisect_left(starts, mark.start())
            beside = [k for k in (after, after - 1) if 0 <= k < len(texts) and _are_beside(text, mark, texts[k])]
            beside = [k for k in beside if k not in labelled]
            if beside:
                labelled.add(beside[0])
                owner = self._owners[texts[beside[0]].lastindex - 1]
                start = min(starts[beside[0]], mark.start())
                offered.append(Mention(letter if free else owner, start, free, owner))
            elif letter not in self.letters:
                unknown.append(Mention(letter, mark.start()))
            elif not (self._shared and self._shared.search(text, max(0, mark.start() - 40), mark.start())):
                offered.append(Mention(letter, mark.start(), free))
        # 2. Texts of options without a letter.
        for index, found in enumerate(texts):
            if index not in labelled:
                owner = self._owners[found.lastindex - 1]
                offered.append(Mention(owner, found.start(), text_of=owner))
        return sorted(offered or unknown, key=lambda mention: mention.start)

    def capitals(self, text: str) -> list[Mention]:
        """The mentions in `text` by a capital letter alone, in order; if none, those of letters that no option has."""
        found = [Mention(capital[1], capital.start()) for capital in _CAPITAL.finditer(text)]
        return [mention for mention in found if mention.letter in self.letters] or found

    def _owner(self, parts: list[str]) -> str | None:
        """The one option with this text; None if no option or several options have it."""
        text = " ".join(parts)
        return self.letters[self._texts.index(text)] if text and self._texts.count(text) == 1 else None


@lru_cache(maxsize=256)
def options_of(choices: tuple[str, ...]) -> Options:
    """`Options(choices)`, cached: many questions of a benchmark have the same options."""
    return Options(choices)


def _are_beside(text: str, mark: re.Match[str], named: re.Match[str]) -> bool:
    """Whether there are only white space and punctuation between a letter and an option's text."""
    if mark.end() <= named.start():
        return _BESIDE.fullmatch(text, mark.end(), named.start()) is not None
    if named.end() <= mark.start():
        return _BESIDE.fullmatch(text, named.end(), mark.start()) is not None
    return True  # one contains the other, as in "choice B" where "choice B" is the text of an option


def _words(text: str) -> list[str]:
    """The words of a text as they are compared: without case, without a leading article, numbers as digits."""
    parts = [_by_value(word) for word in re.findall(r"\w+", text.casefold())]
    return parts[1:] if len(parts) > 1 and parts[0] in _ARTICLES else parts


def _by_value(word: str) -> str:
    if word in _NUMBERS:
        return str(_NUMBERS.index(word))
    return word.lstrip("0") or "0" if word.isascii() and word.isdigit() else word


def _pattern(parts: list[str]) -> str:
    """A regex group that matches the words `parts` in order, with or without an article before them."""

    def either(word: str) -> str:
        if not (word.isascii() and word.isdigit()):
            return re.escape(word)
        spelled = [_NUMBERS[int(word)]] if len(word) < 3 and int(word) < len(_NUMBERS) else []
        return f"(?:{'|'.join([f'0{{0,4}}{word}', *spelled])})"

    words = r"[^\w\n]{1,3}".join(map(either, parts))
    return rf"((?<![\w.])(?:(?:the|an|a)\s)?{words}(?![\w%]|\.\d))"
