"""Reading the project's Markdown pages: headings, links, code, commands. Used by `tests/test_docs.py` alone.

Placeholders of a page are handled here, in one place. A word `…` stands for omitted words and is dropped. A value that
is `<…>`, holds `…`, or is UPPERCASE (also `X.yaml`) stands for a text of the reader's own: its flag is checked, the
value is not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What stands behind these headings is a record of the past: files and commands there may be gone. Links must work.
HISTORY = {"docs/lab_book.md": "History", "docs/performance.md": "History"}
OLD_NAMES = "Old and new names"  # a section whose tables have a file's old path in every cell but the last
SHELL = ("", "sh", "bash", "console")  # languages of code blocks that hold commands; "" for indented ones

_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HTML_LINK = re.compile(r"\b(?:src|srcset|href)=\"([^\"]+)\"")
_REFERENCE = re.compile(r"^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
_INLINE = re.compile(r"(`+)(.+?)\1", re.DOTALL)


@dataclass(frozen=True)
class Code:
    """A code block, or one inline code span (`language` None), and the line that it begins in."""

    text: str
    line: int
    language: str | None = None


@dataclass
class Page:
    """One Markdown file, cut into what the checks look at."""

    path: Path
    headings: list[str] = field(default_factory=list)  # anchors, as GitHub makes them
    links: list[tuple[int, str]] = field(default_factory=list)  # (line, target)
    code: list[Code] = field(default_factory=list)  # without that of a history


def read_page(path: Path, history: str | None = None) -> Page:
    """Cut a page into headings, links and code. Code behind the heading `history` is left out."""
    page, prose, block = Page(path), [], []
    fence, is_history, in_old_names = None, False, False
    start, language, after_blank = 0, "", True

    def end_block() -> None:
        if block and not is_history:
            page.code.append(Code("\n".join(block), start, language))
        block.clear()

    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
        if fence is not None:
            if fenced and fenced[1].startswith(fence):
                end_block()
                fence = None
            else:
                block.append(line)
        elif fenced:
            end_block()
            fence, language, start = fenced[1], fenced[2] or "text", number + 1
        elif line.startswith("    ") and (block or after_blank):
            if not block:
                language, start = "", number
            block.append(line[4:])
        elif not line.strip() and block:
            block.append("")
        else:
            end_block()
            if heading := re.match(r"(#+)\s+(.*?)\s*#*$", line):
                anchor = slug(heading[2])
                page.headings.append(anchor + (f"-{n}" if (n := _count(page.headings, anchor)) else ""))
                is_history = is_history or (history is not None and heading[2] == history)
                in_old_names = heading[2] == OLD_NAMES or (in_old_names and len(heading[1]) > 2)
            text = line.rstrip(" |").rpartition("|")[2] if in_old_names and line.startswith("|") else line
            prose.append((number, text, is_history))
        after_blank = not line.strip()
    end_block()
    _read_prose(page, prose)
    return page


def _read_prose(page: Page, prose: Sequence[tuple[int, str, bool]]) -> None:
    """Links and inline code of all lines outside code blocks; both may reach over a line's end."""
    starts, text = [], ""
    for number, line, _ in prose:
        starts.append((len(text), number))
        text += line + "\n"
    history_at = next((place for (place, _), (_, _, old) in zip(starts, prose, strict=True) if old), len(text))

    def line_of(place: int) -> int:
        return max(number for start, number in starts if start <= place)

    spans = [match for match in _INLINE.finditer(text) if "\n\n" not in match[2]]
    for match in spans:
        if match.start() < history_at:
            page.code.append(Code(" ".join(match[2].split()), line_of(match.start())))
    bare = list(text)
    for match in spans:  # brackets inside code are no link
        bare[match.start() : match.end()] = "x" * (match.end() - match.start())
    for pattern in (_LINK, _HTML_LINK, _REFERENCE):
        page.links += [(line_of(match.start()), match[1]) for match in pattern.finditer("".join(bare))]


def _count(headings: Sequence[str], anchor: str) -> int:
    return sum(re.fullmatch(re.escape(anchor) + r"(-\d+)?", heading) is not None for heading in headings)


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def commands(code: Code) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of the commands in a code block, or of an inline span that is one; lines that end in a backslash
    are joined, and comments, variables in front, and words `…` left out."""
    if code.language is None:
        lines = [(code.line, code.text)] if re.match(r"(make|python3?|torchrun) ", code.text) else []
    elif code.language in SHELL:
        lines, joined = [], ""
        for number, line in enumerate(code.text.splitlines(), code.line):
            joined += line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                lines.append((number, joined))
                joined = ""
    else:
        lines = []
    for number, line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose or a listing, with a single quotation mark
            words = line.split()
        for part in split_commands(words):
            yield number, part


def split_commands(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of a shell line, without variables in front and placeholders for what is left out."""
    part: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "&&", "||", "|", "&"):
            while part and (re.fullmatch(r"[A-Z_]\w*=.*", part[0], re.DOTALL) or part[0] in ("exec", "srun")):
                part = part[1:]
            if part:
                yield [word for word in part if word not in ("…", "...")]
            part = []
        elif word.endswith(";"):
            part.append(word.rstrip(";"))
            yield from split_commands(part)
            part = []
        else:
            part.append(word)


def is_placeholder(value: str) -> bool:
    """Whether a value stands for one that the reader fills in."""
    return "…" in value or "<" in value or re.fullmatch(r"[A-Z][A-Z0-9_]+|[A-Z]\.yaml", value) is not None


def module_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of `python -m module arguments`, or of torchrun's; None for another command."""
    runs_python = words and Path(words[0]).name in ("python", "python3", "torchrun", "$(PY)")
    if not runs_python or "-m" not in words:
        return None
    at = words.index("-m")
    return (words[at + 1], list(words[at + 2 :])) if at + 1 < len(words) else None
