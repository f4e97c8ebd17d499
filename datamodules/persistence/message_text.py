"""Parts of messages to the user: long lists and errors of other libraries, cut to one line."""

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
