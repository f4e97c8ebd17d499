"""Describe the differences between two runs, and let the user choose if only the code differs.

A finished run with other code is never silently used as the requested run, and never deleted. The command names the
changed files and ends, until the user chooses with KEEP=1 (--keep) or REDO=1 (--redo).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.persistence.files import fingerprint
from datamodules.persistence.message_text import listed
from datamodules.persistence.source_code import Code, changed_files
from datamodules.persistence.user_error import UserError

Choice = Literal["redo", "keep"]
Inputs = dict[str, list[tuple[str, str | None]]]  # {"data.shards": [(path, hash of its content), …]}

UNKNOWN_FILES = "  Which ones is not known: an earlier version of the project has made it, and wrote none down."
MOST_LINES, MOST_FILES = 8, 6  # largest numbers in a message; the rest is only counted
# Groups of settings whose names the user has chosen, and settings of the data that every version writes down only if
# they are not the default: no version of the project has added or removed one.
USERS_GROUPS = re.compile(r"(.*\.)?(parameters|reward_weights|bounds)$|.*\.rewards\[")
WRITTEN_IF_GIVEN = ("data.order", "data.weights")


class CodeChanged(UserError):
    """The existing results were made with other source files. The message asks the user to choose."""


class OtherRun(UserError):
    """A folder holds a run with other settings, and nothing was moved. The message names them and the cures."""


@dataclass(frozen=True)
class MadeOf:
    """Settings, inputs and code of a run.

    `saved` reads settings and inputs from the config.yaml of a run of an earlier version, which did not record them.
    """

    key: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    code: Code = field(default_factory=dict)
    saved: Callable[[Mapping[str, Any]], tuple[dict[str, Any], Inputs]] | None = None

    def record(self) -> dict[str, Any]:
        """The content of started.json."""
        return {"key": self.key, "settings": self.settings, "inputs": self.inputs, "code": self.code}


@dataclass(frozen=True)
class Differences:
    """`values`: settings and inputs that differ, as "name: old -> new". `fields`: settings that only one run has.

    A field is a setting that a version of the project has added or removed, so its value in the other run is unknown.
    `contents`: the `values` that are inputs at the same place with another content.
    """

    values: list[str]
    fields: list[str]
    contents: list[str]


def take_choice(words: Sequence[str]) -> tuple[Choice | None, list[str]]:
    """The choice in a command line, --redo or --keep, and its other words. Giving both ends the program."""
    found = [word[2:] for word in words if word in ("--redo", "--keep")]
    if len(set(found)) > 1:
        raise SystemExit("--redo and --keep (REDO=1 and KEEP=1) exclude each other: give one of them")
    return (found[0] if found else None), [word for word in words if word not in ("--redo", "--keep")]


def choice_of(redo: bool, keep: bool) -> Choice | None:
    """The choice from two settings of a command. Giving both ends the program."""
    return take_choice(["--redo"] * redo + ["--keep"] * keep)[0]


def spell_out(words: Sequence[str] | None) -> list[str]:
    """The command line, by default of this process, with --redo=true for --redo and so on, as jsonargparse needs it."""
    words = sys.argv[1:] if words is None else words
    return [f"{word}=true" if word in ("--redo", "--keep") else word for word in words]


def is_stale(record: Mapping[str, Any], code: Code, choice: Choice | None = None) -> bool:
    """Whether other code than `code` made the recorded result, and the result was not kept for `code`.

    A record without code comes from an earlier version of the project. The choice "redo" includes kept results.
    """
    if not code or record.get("code") == code:
        return False
    return choice == "redo" or record.get("kept") != fingerprint(code)


def decide(is_other_code: bool, choice: Choice | None, message: Callable[[], str]) -> Choice | None:
    """The user's choice about an existing result from other code; None if no choice is needed.

    Raises CodeChanged with `message`, which asks for a choice, if the user has made none.
    """
    if is_other_code and choice is None:
        raise CodeChanged(message())
    return choice if is_other_code else None


def kept(record: Mapping[str, Any], code: Code) -> dict[str, Any]:
    """Fields for the record of a result that is kept for `code`, so that the command does not ask again."""
    return {"code": record.get("code", {}), "kept": fingerprint(code)}


def origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record with the code that made the result, and the code for which it was kept."""
    return {name: record[name] for name in ("code", "kept") if name in record}


def find_differences(old: Mapping[str, Any], new: MadeOf) -> Differences:
    """The differences of settings and inputs between a recorded run and a new run."""
    found = Differences([], [], [])
    # Through JSON, so that tuples equal lists and paths equal texts, as they do in the saved record.
    before, now = (json.loads(json.dumps(each, default=str)) for each in (old.get("settings", {}), new.settings))
    _walk("", before, now, found)
    for name, inputs in new.inputs.items():
        before = [tuple(pair) for pair in old.get("inputs", {}).get(name, [])]
        if not _same_inputs(before, inputs):
            shown = name.replace(".init_args", "")
            found.values.append(f"{shown}: {_inputs_text(before)} -> {_inputs_text(inputs)}")
            if [path for path, _ in before] == [path for path, _ in inputs]:
                found.contents.append(found.values[-1])
    return found


def question(what: str, is_done: bool, record: Mapping[str, Any], code: Code, fields: Sequence[str] = ()) -> str:
    """The message that asks for KEEP=1 or REDO=1 when other code has made an existing result.

    Args:
        what: the result, in words.
        is_done: whether it is finished.
        record: its started.json, or another record with the field "code".
        code: the source files as they are now.
        fields: names of settings that only one of the two runs has.
    """
    state = "is finished" if is_done else "is unfinished"
    lines = [f"{what} {state} with these settings and inputs, but other source files of the project have made it."]
    if record.get("code") == code:
        lines = [f"{what} {state}, and differs by settings that only one of the two runs has."]
    elif record.get("code"):
        lines.append(f"  changed since: {listed(changed_files(record['code'], code), MOST_FILES)}")
    else:
        lines.append(UNKNOWN_FILES)
    if fields:
        lines.append(f"  settings that only one of the two has: {listed(fields, MOST_FILES)}")
    keep = "keeps it as it is" if is_done else "goes on with it, by the code as it is now"
    lines.append(f"KEEP=1 (flag --keep) {keep}; REDO=1 (flag --redo) moves it aside and starts afresh.")
    return "\n".join(lines)


def changed_text(records: Sequence[tuple[str, Mapping[str, Any], Code]]) -> str:
    """The message that asks for KEEP=1 or REDO=1 for several steps: (title, record, present code) of each."""
    files = [name for _, record, code in records for name in changed_files(record.get("code", {}), code)]
    unknown = [title for title, record, _ in records if not record.get("code")]
    titles = listed([title for title, _, _ in records], MOST_FILES)
    lines = [f"Other source files of the project have made what is there, with the same settings and inputs: {titles}."]
    if unknown:
        lines.append(UNKNOWN_FILES)
    else:
        lines.append(f"  changed since: {listed(list(dict.fromkeys(files)), MOST_FILES)}")
    lines.append("KEEP=1 (flag --keep) keeps it, and goes on with what is unfinished by the code as it is now;")
    lines.append("REDO=1 (flag --redo) moves it aside and makes it again, and what is made from it.")
    return "\n".join(lines)


def other_run_text(folder: object, is_done: bool, differences: Differences, cure: str) -> str:
    """The message that a folder holds a run with other settings: what differs, and the ways to go on; a few lines.

    Args:
        folder: the phase folder.
        is_done: whether its run is known to be finished; sweeps and syntheses do not say it.
        differences: those of its run and of the run that wants to use it.
        cure: how both runs are kept.
    """
    names = [*differences.values, *(f"{name}: only one of the two has it" for name in differences.fields)]
    # The seed of module and data is the run's: it is told once.
    is_reseeded = any(name.startswith("seed_everything:") for name in names)
    names = [name for name in names if not (is_reseeded and name.startswith(("data.seed:", "model.seed:")))]
    state = ", which is finished" if is_done else ""
    lines = [f"{folder} holds a run with other settings{state}; nothing was moved. Different (old -> new):"]
    lines += [f"  {line}" for line in ("; ".join(names[:2]), "; ".join(names[2:4])) if line]
    if not names:
        lines.append("  which settings, it did not write down")
    if len(names) > 4:
        lines[-1] += f"; and {len(names) - 4} more: compare {folder}/config.yaml"
    lines.append(f"{cure} Or give the old values again.")
    lines.append("REDO=1 (flag --redo) moves the old run aside, under another name, and starts afresh.")
    return "\n".join(lines)


def set_aside_text(folder: object, aside: object, differences: Differences) -> str:
    """The message that a folder with another run was moved: the differences, the new path, and how to undo it."""
    names = [*differences.values, *(f"{name}: only one of the two has it" for name in differences.fields)]
    shown = [f"  {line}" for line in names[:MOST_LINES]] or ["  which ones it did not write down"]
    if len(names) > MOST_LINES:
        shown.append(f"  and {len(names) - MOST_LINES} more: {aside}/config.yaml has its settings")
    back = f"to go back to it: mv {folder} {folder}.new && mv {aside} {folder}, and give the old values"
    return "\n".join([f"{folder} holds a run with other settings or inputs (old -> new):", *shown, back])


def _walk(name: str, old: Any, new: Any, found: Differences) -> None:
    """Add the differences of two values, field by field; lists of classes are compared class by class."""
    old, new = _by_class(old), _by_class(new)
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        if old != new:
            found.values.append(f"{name}: {_brief(old)} -> {_brief(new)}")
        return
    orders = [" ".join(key for key in side if key.startswith("[")) for side in (old, new)]
    if old.keys() == new.keys() and orders[0] != orders[1]:  # the order of a list of classes, which is in the key too
        found.values.append(f"{name}: {orders[0]} -> {orders[1]}".replace(".init_args", ""))
    for key in sorted(old.keys() | new.keys()):
        dotted = key if key.startswith("[") else f".{key}"
        dotted = (name + dotted).lstrip(".").replace(".init_args", "")
        if key in old and key in new:
            _walk(dotted, old[key], new[key], found)
        # the list of callbacks is the user's choice, not a difference between versions of the project
        elif key.startswith("["):
            found.values.append(f"{dotted}: {_presence(key in old)} -> {_presence(key in new)}")
        elif USERS_GROUPS.match(name) or dotted in WRITTEN_IF_GIVEN:
            before, now = (_brief(side[key]) if key in side else _presence(False) for side in (old, new))
            found.values.append(f"{dotted}: {before} -> {now}")
        else:
            found.fields.append(dotted)


def _by_class(value: Any) -> Any:
    """[{"class_path": "callbacks.a.B", …}] as {"[B]": …}; other values are returned unchanged."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) and "class_path" in item for item in value):
        return value
    # By class and not by position: otherwise a callback that is added at the front would make all others differ.
    names = [item["class_path"].rpartition(".")[2] for item in value]
    return {f"[{name}{'+' * names[:k].count(name)}]": value[k] for k, name in enumerate(names)}


def _same_inputs(old: Sequence[tuple[str, str | None]], new: Sequence[tuple[str, str | None]]) -> bool:
    """Whether inputs are equal: by content, or by path if the old content is unknown."""
    if len(old) != len(new):
        return False
    return all(a[1] == b[1] if a[1] is not None else a[0] == b[0] for a, b in zip(old, new, strict=True))


def _inputs_text(inputs: Sequence[tuple[str, str | None]]) -> str:
    return ", ".join(f"{path} ({content[:8]})" if content else path for path, content in inputs) or "none"


def _presence(is_there: bool) -> str:
    return "there" if is_there else "not there"


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
