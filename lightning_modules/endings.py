"""Ends of a run that are no fault of the program: the message states the reason in full, and no traceback follows."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """A run that ends for a reason that its message states in full; what it has reached is saved."""


class NothingLearnt(RunStopped):
    """A run whose training has changed nothing."""


class IdleTooLong(NothingLearnt):
    """Raised in training, by all ranks together, behind a finished window of batches."""
