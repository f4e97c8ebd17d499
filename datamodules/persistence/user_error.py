"""The base class of all errors that a user can fix. A command prints only their message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the code is wrong: a setting, a file, a server, a disk.

    The message has one to five lines. It says what is wrong and where, with the value, and how to fix it.
    `experiments.runs.commands.command` prints it and ends the program with exit code 1.
    """


class SettingsError(UserError, ValueError):
    """The settings cannot be run. The message has every problem that was found."""
