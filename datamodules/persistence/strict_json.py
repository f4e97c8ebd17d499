"""JSON without the texts that Python's decoder accepts although they are no JSON.

Python's decoder reads NaN and Infinity, which JSON does not have. If an object has a key twice, it silently keeps the
last value.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_strictly(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for NaN, Infinity and an object with a key twice."""
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)


def refuse_constant(name: str) -> NoReturn:
    """The hook `parse_constant`: raises ValueError for NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The hook `object_pairs_hook`: the decoded object.

    Raises:
        ValueError: the object has a key twice; the message names the first such key.
    """
    found = dict(pairs)
    if len(found) < len(pairs):  # search the key only if there is one; this keeps large files fast
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:40]!a} is given twice in one object")
            seen.add(name)
    return found
