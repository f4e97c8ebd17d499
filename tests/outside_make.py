"""The environment of a `make` that a test starts."""

from __future__ import annotations

import os

INHERITED = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")


def outside_make() -> dict[str, str]:
    """This process's environment without what an outer `make test` hands on: its flags, and its level, with which an
    inner make prints the folders that it enters."""
    return {name: value for name, value in os.environ.items() if name not in INHERITED}
