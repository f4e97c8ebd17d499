"""Durations in words, and the place of a process in a longer command: its stage, and the time that is left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

OUTLOOK = "GROUNDING_OUTLOOK"  # environment variable with the `Outlook` of a process


def in_words(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min".

    >>> in_words(45), in_words(740), in_words(11100)
    ('45 s', '12 min', '3 h 05 min')
    """
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class Outlook:
    """The stage of a pipeline, an ablation or a sweep that a process carries out, and the expected times.

    Args:
        stage: the stage in words, such as "2 of 5, cot_sft: training".
        began: start of the stage, in seconds since the epoch.
        expected: expected seconds of the stage; None if they are unknown.
        later: expected seconds of all later stages; None if they are unknown.
        alike: number of further stages, not counted in `later`, that take as long as this stage.
        evidence: the weight of the expected times, in seconds; this stage corrects them by its own duration.
        parts: part of the stage, such as "rejection sampling" -> expected seconds from the start of the stage to the
            end of the part.
    """

    stage: str
    began: float
    expected: float | None = None
    later: float | None = None
    alike: int = 0
    evidence: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The environment variable for the process of the stage."""
        return {OUTLOOK: json.dumps(asdict(self))}

    def seconds_left(self, left: float, part: str | None = None) -> float | None:
        """Seconds until the end of all stages; None if they are unknown.

        Args:
            left: seconds that the present work still takes.
            part: the work, if the stage does not end with it. Rejection sampling, for example, is a part of a training
                stage.
        """
        spent = time.time() - self.began
        if part is not None:
            if self.expected is None:
                return None
            if part in self.parts:
                left += (self.expected - self.parts[part]) * self._pace(spent + left, self.parts[part])
            else:
                left = max(left, self.expected - spent)
        if self.later is None:
            return None
        whole = spent + left
        pace = 1.0 if self.expected is None else self._pace(whole, self.expected)
        return left + self.later * pace + self.alike * whole

    def _pace(self, seconds: float, expected: float) -> float:
        """The factor by which work on this machine takes longer than expected, if a part of it takes `seconds`."""
        return (self.evidence + seconds) / (self.evidence + expected)


def own_outlook() -> Outlook | None:
    """The outlook of this process; None outside of a pipeline, an ablation and a sweep."""
    text = os.environ.get(OUTLOOK)
    return Outlook(**json.loads(text)) if text else None


def stage_prefix() -> str:
    """ "[2 of 5, cot_sft: training] " in a stage, else ""."""
    outlook = own_outlook()
    return f"[{outlook.stage}] " if outlook else ""


def left_text(left: float, part: str | None = None) -> str:
    """ "2 min left", in a stage "2 min left, of all stages 10 min". The arguments are those of `seconds_left`."""
    outlook = own_outlook()
    whole = None if outlook is None else outlook.seconds_left(left, part)
    return f"{in_words(left)} left" + ("" if whole is None else f", of all stages {in_words(whole)}")
