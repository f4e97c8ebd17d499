"""Check the fields of a source's records, count them, and report them before anything is written."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Kinds = type | tuple[type, ...]
NUMBER = (int, float)
_NO_BOOL = (int, NUMBER, (int, str))  # in Python True is an int, in JSON it is not a number
REPORTED = 600  # number of characters of a first record in the printed report
MOST_NAMES = 200  # number of field names that are counted; there is a limit because a file may use ids as names


class Schema:
    """Counts keys and values of records and keeps the first record of each kind.

    A field that is missing, unknown or of another type raises ValueError with the position, the field and the value.
    `allow` names unknown fields that the user accepts.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self.allow = frozenset(allow)
        self.keys: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.first: dict[str, Any] = {}

    def check(
        self,
        kind: str,
        record: Any,
        where: str,
        required: Mapping[str, Kinds],
        optional: Mapping[str, Kinds] | None = None,
    ) -> None:
        """Check one record of `kind`; `where` is its position in the file, for the message."""
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a record of {kind} is an object, found {record!r:.200}")
        for name, kinds in required.items():
            if name not in record:
                raise ValueError(f"{where}: field {name!r} is missing, found {sorted(map(str, record))}")
            _check_type(record[name], kinds, where, name)
        for name in record.keys() - required.keys():
            if optional and name in optional:
                _check_type(record[name], optional[name], where, name)
            elif name not in self.allow:
                raise ValueError(
                    f"{where}: unknown field {name!r} = {record[name]!r:.200}; if it does not matter, admit it by"
                    f" --allow '[{json.dumps(str(name))}]'"
                )
        # Counted after the check, because an unexpected field stops the import.
        self.keys[kind].update(record.keys())
        self.first.setdefault(kind, record)

    def tally(self, kind: str, record: Mapping[str, Any], known: Collection[str]) -> None:
        """Count the fields of a record without refusing any; for data of any tool. Unknown fields are shown."""
        for name in map(str, record):
            self._count_name(self.keys[kind], name)
            if name not in known:
                self._count_name(self.counts[f"unknown fields of {kind}, not used"], name)
        if kind not in self.first:
            self.first[kind] = _plain(record)

    def count(self, what: str, value: str) -> None:
        self.counts[what][value] += 1

    @staticmethod
    def _count_name(counter: Counter[str], name: str) -> None:
        name = name.encode("utf-8", "replace").decode()  # half a surrogate pair can be neither printed nor written
        counter[name if name in counter or len(counter) < MOST_NAMES else "(further names)"] += 1

    def report(self) -> dict[str, Any]:
        """{"keys": {kind: {key: n}}, "counts": {what: {value: n}}, "first": {kind: record}}."""
        return {
            "keys": {kind: dict(counter) for kind, counter in self.keys.items()},
            "counts": {what: dict(counter.most_common()) for what, counter in self.counts.items()},
            "first": self.first,
        }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as lines for people; long records are cut."""
    lines = []
    for kind, counts in report["keys"].items():
        lines.append(f"  {kind}: " + ", ".join(f"{key} {count:,}" for key, count in counts.items()))
    for what, counts in report["counts"].items():
        shown = [f"{value} {count:,}" for value, count in list(counts.items())[:30]]
        shown += [f"and {len(counts) - 30} more"] * (len(counts) > 30)
        lines.append(f"  {what}: " + ", ".join(shown))
    for kind, record in report["first"].items():
        text = json.dumps(record, ensure_ascii=False, default=str)
        lines.append(f"  first of {kind}: {text[:REPORTED]}{' …' if len(text) > REPORTED else ''}")
    return "\n".join(lines)


def _plain(record: Any) -> Any:
    """Make a record valid for JSON: dates and bytes become texts, half surrogate pairs become question marks."""
    try:
        text = json.dumps(record, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return "no JSON, or nested too deep"
    return json.loads(text.encode("utf-8", "replace"))


def _check_type(value: Any, kinds: Kinds, where: str, name: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds in _NO_BOOL):
        names = "/".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{where}: field {name!r} should be {names}, found {value!r:.200}")
