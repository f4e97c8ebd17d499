"""Durations in words, and the environment variables that tell a process its stage in the pipeline."""

from __future__ import annotations

STAGE = "GROUNDING_STAGE"  # such as "2 of 5, cot_sft: training"
LATER_SECONDS = "GROUNDING_LATER_SECONDS"  # expected seconds of all stages after this one


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
