"""Where a text names options: by letter ("(B)", "option B", "B.") or by the option's own text ("the third image").

Rules of one mention:

- Texts are compared by words, without case and a leading article. Numbers count by value: "four", "4" and "04" are one.
  A text that two options share names neither. "dark red circle" names no option "red circle".
- A letter beside an option's text is one mention with it: "(B) the third image", "the third image (B)". Where the two
  differ, the text counts, unless the letter is offered and stands free, with white space round "(B)".
- A letter behind the word that all options end in names something else: "the first image (A)", where only the second
  and the third image can be chosen.
- A capital alone counts only where nothing else that is claimed names an option. "A" and "I" before a small letter are
  words ("A dog"), but not before words that follow no article ("A is", "A and", "A in").
- A letter that no option has counts only where nothing else is named.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

# "A" and "I" before a small letter are words, but not before words that follow no article.
_NO_ARTICLE = "and|or|is|are|was|were|has|have|does|can|would|but|because|since|at|by|for|from|in|of|on|to|which|with"
_NO_WORD = rf"(?!\s+(?!(?:{_NO_ARTICLE})\b)[a-z])"
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
# Models that know Chinese answer in it now and then. A text that is one such word names the option with this text.
_CHINESE = {
    "左": "left", "右": "right", "上": "up", "下": "down", "前": "front", "后": "back", "中": "middle",
    "是": "yes", "否": "no", "对": "true", "错": "false",
    "零": "0", "一": "1", "二": "2", "两": "2", "三": "3", "四": "4", "五": "5", "六": "6", "七": "7", "八": "8",
    "九": "9", "十": "10",
}  # fmt: skip
_CHINESE_WORD = re.compile(rf"([{''.join(_CHINESE)}])[边侧面方]?")


@dataclass(frozen=True)
class Mention:
    """One place that names an option: Mention("B", 10, free=True, text_of="A") is "the second image (B)" at 10, where
    A is the second image."""

    letter: str  # the option that is meant
    start: int
    free: bool = False  # by "(B)" between white space
    text_of: str | None = None  # the option whose own text stands here


class Options:
    """The options of one question, A, B, … in order."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.letters = [chr(ord("A") + index) for index in range(len(choices))]
        words = [_words(choice) for choice in choices]
        self._texts = [" ".join(parts) for parts in words]
        own = [(parts, letter) for parts, letter in zip(words, self.letters, strict=True) if self._owner(parts)]
        own.sort(key=lambda pair: -len(pair[0]))  # the longer text first
        self._owners = [letter for _, letter in own]
        self._named = re.compile("|".join(_pattern(parts) for parts, _ in own), re.IGNORECASE) if own else None
        ends = {parts[-1] for parts in words if len(parts) > 1}
        shared = len(ends) == 1 and all(len(parts) > 1 for parts in words)
        self._shared = re.compile(rf"\b{re.escape(ends.pop())}[\s*\"']{{1,3}}$", re.IGNORECASE) if shared else None

    def named_by(self, text: str) -> str | None:
        """The option whose text is the whole of `text`."""
        parts = _words(text[:2000])
        if len(parts) == 1 and (chinese := _CHINESE_WORD.fullmatch(parts[0])):
            parts = [_CHINESE[chinese[1]]]
        return self._owner(parts)

    def mentions(self, text: str) -> list[Mention]:
        """Mentions in `text` by a marked letter or by text, in order; without any, those of letters that none has."""
        texts = [] if self._named is None else [*self._named.finditer(text)]
        starts = [found.start() for found in texts]
        labelled: set[int] = set()
        offered, unknown = [], []
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
        for index, found in enumerate(texts):
            if index not in labelled:
                owner = self._owners[found.lastindex - 1]
                offered.append(Mention(owner, found.start(), text_of=owner))
        return sorted(offered or unknown, key=lambda mention: mention.start)

    def capitals(self, text: str) -> list[Mention]:
        """Mentions in `text` by a capital alone, in order; without any, those of letters that no option has."""
        found = [Mention(capital[1], capital.start()) for capital in _CAPITAL.finditer(text)]
        return [mention for mention in found if mention.letter in self.letters] or found

    def _owner(self, parts: list[str]) -> str | None:
        text = " ".join(parts)
        return self.letters[self._texts.index(text)] if text and self._texts.count(text) == 1 else None


@lru_cache(maxsize=256)
def options_of(choices: tuple[str, ...]) -> Options:
    """`Options(choices)`, kept: a subset asks many questions with the same ones."""
    return Options(choices)


def _are_beside(text: str, mark: re.Match[str], named: re.Match[str]) -> bool:
    if mark.end() <= named.start():
        return _BESIDE.fullmatch(text, mark.end(), named.start()) is not None
    if named.end() <= mark.start():
        return _BESIDE.fullmatch(text, named.end(), mark.start()) is not None
    return True  # one inside the other: "choice B" where "choice B" is the text


def _words(text: str) -> list[str]:
    parts = [_by_value(word) for word in re.findall(r"\w+", text.casefold())]
    return parts[1:] if len(parts) > 1 and parts[0] in _ARTICLES else parts


def _by_value(word: str) -> str:
    if word in _NUMBERS:
        return str(_NUMBERS.index(word))
    return word.lstrip("0") or "0" if word.isascii() and word.isdigit() else word


def _pattern(parts: list[str]) -> str:
    """A group that finds the words of `parts` behind each other, with an article before them."""

    def either(word: str) -> str:
        if not (word.isascii() and word.isdigit()):
            return re.escape(word)
        spelled = [_NUMBERS[int(word)]] if len(word) < 3 and int(word) < len(_NUMBERS) else []
        return f"(?:{'|'.join([f'0{{0,4}}{word}', *spelled])})"

    words = r"[^\w\n]{1,3}".join(map(either, parts))
    return rf"((?<![\w.])(?:(?:the|an|a)\s)?{words}(?![\w%]|\.\d))"
