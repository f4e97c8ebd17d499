"""Ends of a run that are no fault of the program: the message states the whole reason, and no traceback follows."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """A run that ends for the reason in its message; its progress is saved."""


class NothingLearnt(RunStopped):
    """A run whose training has changed nothing."""


class IdleTooLong(NothingLearnt):
    """Raised in training, by all ranks together, behind a finished window of batches."""
