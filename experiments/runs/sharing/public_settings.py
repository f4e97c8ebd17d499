"""Settings as strangers may read them: without addresses of servers, private paths and names of keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# Fields that say where a run worked, and change no result: servers, folders, files, and the variables of keys.
_PRIVATE = ("vllm", "log", "log_every", "base_url", "servers", "adapters", "extra_body")
_KEY_NAME = re.compile(r"_env$|(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)
# An address anywhere in a text. Names on the Hub are public.
_ADDRESS = re.compile(r"\b(?!hf://)[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"`,)\]}]+")
# A path that leads out of the working directory: /x, ~/x, ~user/x, ../x, C:\x.
_OUTSIDE = re.compile(r"[/\\]|~\w*/|\.\./|[A-Za-z]:[/\\]")
OUTPUTS = "outputs"  # the folder of experiments: the names behind it are the project's own


def public(value: Any) -> Any:
    """`value` of a setting without what is private; mappings and lists are searched too.

    Fields with a private name are left out. An absolute path becomes its last name, or the part from `outputs` on; a
    path in the working directory stays. An address becomes "(an address)", a shell command "(a command)".
    """
    if isinstance(value, Mapping):
        shown: dict[Any, Any] = {}
        for name, entry in value.items():
            if not _is_private(name):
                # Names of two folders can become equal, for example in {folder: weight}.
                key = public(name)
                shown[f"{key} ({len(shown) + 1})" if key in shown else key] = public(entry)
        return shown
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    return _public_text(value) if isinstance(value, str) else value


def _is_private(name: Any) -> bool:
    return isinstance(name, str) and (name in _PRIVATE or _KEY_NAME.search(name) is not None)


def _public_text(text: str) -> str:
    if text.startswith("pipe:"):
        return "(a command)"
    if text.startswith("{") and text.endswith("}") and "\n" not in text:  # a list of folders in one text
        return "{" + ",".join(_public_text(part.strip()) for part in text[1:-1].split(",")) + "}"
    is_outside = _OUTSIDE.match(text) or ".." in PurePosixPath(text).parts
    if not is_outside or "\n" in text:
        return _ADDRESS.sub("(an address)", text)
    names = (PureWindowsPath(text) if "\\" in text else PurePosixPath(text)).parts[1:]
    kept = names[names.index(OUTPUTS) :] if OUTPUTS in names else names[-1:]
    return "/".join(("…", *kept))
