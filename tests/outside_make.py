"""The environment of a `make` that a test starts."""

from __future__ import annotations

import os
import re

INHERITED = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")


def outside_make() -> dict[str, str]:
    """This process's environment without what an outer `make test ARGS=...` hands on: its flags, the variables of its
    command line, and its level, with which an inner make prints the folders that it enters."""
    # The form is "w -- ARGS=-k\\ name": variables come after the flags, and a blank in a value follows a backslash.
    _, _, variables = f" {os.environ.get('MAKEFLAGS', '')}".partition(" -- ")
    given = [word.partition("=")[0] for word in re.split(r"(?<!\\)\s+", variables)]
    return {name: value for name, value in os.environ.items() if name not in (*INHERITED, *given)}
