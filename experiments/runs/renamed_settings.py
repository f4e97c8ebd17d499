"""Settings and class paths that have been renamed: an old name ends the command with the new one in the message."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Class paths that users' YAML files name: old prefix -> new prefix.
MOVED = {"callbacks.guards.": "callbacks.save_on_interrupt.", "callbacks.collapse.": "callbacks.collapse_guard."}
# Settings: last part of the old name -> the new name, as a YAML key or as a command-line flag.
RENAMED = {
    "convention": "box_format",
    "dialect": "model_family",
    "sides": "contenders",
    "window": "average_over",  # of CollapseGuard
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
    """End the program if the command line, or a YAML file that it names, has settings at its top level that the command
    now has elsewhere; all of them are named.

    Args:
        arguments: the command line; None: this process's.
        moved: old name -> the new one, such as {"style": "form.style"}.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    words = {text for argument in arguments for text in (argument, argument.partition("=")[2])}
    found = [("--", argument[2:].partition("=")[0]) for argument in arguments if argument.startswith("--")]
    for file in sorted(Path(word) for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()):
        found += [(f"{file}: ", line.partition(":")[0]) for line in file.read_text(errors="replace").splitlines()]
    if faults := [f"  - {where}{name}: write {moved[name]}" for where, name in found if name in moved]:
        sys.exit("\n".join(["settings that have moved:", *faults]))
