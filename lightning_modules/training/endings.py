"""Exceptions that end a run without an error of the program. Commands print the message without a traceback."""

from __future__ import annotations

from datamodules.persistence.user_error import UserError


class RunStopped(UserError, RuntimeError):
    """The run ends for the reason in the message; its progress is saved."""


class NothingLearnt(RunStopped):
    """Training has not changed the policy."""


class IdleTooLong(NothingLearnt):
    """GRPO has learnt nothing for too long. All ranks raise this together, at the end of an accumulation window."""
