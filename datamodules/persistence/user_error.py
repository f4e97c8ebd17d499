"""The base of all errors that a user can cure: a command prints their message alone, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the code is wrong: a setting, a file, a server, a disk.

    The message has one to five lines. It says what is wrong and where, with the value, and how to cure it.
    `experiments.runs.commands.command` prints it and ends the program with exit code 1.
    """
