"""Hooks of Python's JSON decoder that refuse text which the decoder alone would take.

Python reads NaN and Infinity, which JSON does not have. Where an object has a key twice, Python keeps the last value
without a word.
"""

from __future__ import annotations

from typing import Any, NoReturn


def refuse_constant(name: str) -> NoReturn:
    """For `parse_constant`: raises ValueError for NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: the object. Raises ValueError that names the first key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:40]!a} is given twice in one object")
            seen.add(name)
    return found
