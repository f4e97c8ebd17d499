"""Settings and class paths that have been renamed: an old name ends the command with the new one in the message."""

from __future__ import annotations

import re

# Class paths that users' YAML files name: old prefix -> new prefix.
MOVED = {"callbacks.guards.": "callbacks.save_on_interrupt.", "callbacks.collapse.": "callbacks.collapse_guard."}
# Settings: last part of the old name -> the new name, as a YAML key or as a command-line flag.
RENAMED = {
    "convention": "box_format",
    "dialect": "model_family",
    "sides": "contenders",
    "window": "average_over",  # of CollapseGuard
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
