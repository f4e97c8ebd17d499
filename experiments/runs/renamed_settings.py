"""Settings and class paths that have been renamed: an old name ends the command with the new one in the message."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

# Class paths that users' YAML files name: old prefix -> new prefix.
MOVED = {"callbacks.guards.": "callbacks.save_on_interrupt.", "callbacks.collapse.": "callbacks.collapse_guard."}
# Settings: last part of the old name -> the new name, as a YAML key or as a command-line flag.
RENAMED = {
    "convention": "box_format",
    "dialect": "model_family",
    "sides": "contenders",
    "twins": "replicas",
    "limit_per_task": "limit",
}
_SETTING = re.compile(r"\s*(?:- )?([A-Za-z_]\w*)\s*:(?=\s|$)")  # a YAML key at the beginning of a line
_FLAG = re.compile(r"--(?:[\w.]*\.)?(\w+)(?:=|$)")  # --model.beta=0.01, or --model.beta before its value


def find_old_name(line: str) -> str | None:
    """What to write instead of an old name in `line`, a line of YAML or one command-line argument; else None."""
    found = _FLAG.match(line) or _SETTING.match(line)
    if found and (new := RENAMED.get(found[1])):
        return f"the setting {found[1]} has been renamed. Write {new} instead"
    for old, moved in MOVED.items():
        if old in line:
            return f"{old}* has moved. Write {moved}* instead"
    return None


def refuse_moved(arguments: Sequence[str] | None, moved: Mapping[str, str]) -> None:
    """End the program if the command line, or a YAML file that it names, has a setting of the top level that one
    command now has elsewhere; all of them are named.

    Args:
        arguments: the command line; None: this process's.
        moved: old name -> the new one, such as {"style": "form.style"}.
    """
    faults = []
    for argument in sys.argv[1:] if arguments is None else arguments:
        flag, _, value = argument.partition("=")
        if flag.startswith("--") and (new := moved.get(flag[2:])):
            faults.append(f"{flag}: write --{new}")
        for file in (Path(text) for text in {argument, value} if text.endswith((".yaml", ".yml"))):
            faults += [f"{file}: {name}: write {moved[name]}" for name in find_top_level(file) if name in moved]
    if faults:
        sys.exit("settings that have moved:\n" + "\n".join(f"  - {fault}" for fault in dict.fromkeys(faults)))


def find_top_level(file: Path) -> list[str]:
    """The names at the top level of a YAML file; [] for one that is missing or no mapping (its parser says so)."""
    try:
        content = yaml.safe_load(file.read_text(errors="replace")) if file.is_file() else None
    except yaml.YAMLError:
        return []
    return [str(name) for name in content] if isinstance(content, dict) else []
