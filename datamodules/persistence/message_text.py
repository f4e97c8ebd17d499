"""Parts of texts for the user: long lists and errors of other libraries, cut to one line, and Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and the number of further names: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """The error in one line of at most 300 characters: its type, and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # some messages begin with empty lines
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text cells, header first, as a Markdown table."""
    header, *body = rows
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, ["---"] * len(header), *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
