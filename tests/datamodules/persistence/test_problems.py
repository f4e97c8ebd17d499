"""Checks of settings: what they refuse, and the sentences."""

from __future__ import annotations

import math

import pytest

from datamodules.persistence.problems import Problems, collect_problems


def test_all_problems_are_raised_together_with_names_values_and_rules() -> None:
    problems = Problems()
    problems.positive(rate=0.0, steps=1)
    problems.positive_or_null(cap=-1, norm=None)
    problems.at_least(2, group_size=1, samples=2)
    problems.one_of(("token", "sample"), reduction="mean")
    problems.require(False, ": give one of the two", shards=[], parts=None)
    with pytest.raises(ValueError) as caught:
        problems.raise_all("GRPO")
    assert str(caught.value) == (
        "GRPO: rate=0.0 must be greater than 0; cap=-1 must be greater than 0, or null; "
        "group_size=1 must be at least 2; "
        "reduction='mean' must be one of 'token', 'sample'; shards=[], parts=None: give one of the two"
    )


def test_nothing_is_raised_without_a_problem() -> None:
    problems = Problems()
    problems.positive(rate=1e-6)
    problems.at_least(1, steps=1)
    problems.require(True, "must be in [0, 1)", fraction=0.5)
    problems.raise_all("GRPO")
    assert problems == []


def test_a_nan_is_refused_and_a_prefix_stands_before_each_name() -> None:
    problems = Problems("lora.")
    problems.positive(alpha=math.nan)
    problems.at_least(0, dropout=math.nan)
    problems.positive_or_null(rank=math.nan)
    assert [sentence.split("=")[0] for sentence in problems] == ["lora.alpha", "lora.dropout", "lora.rank"]


def test_problems_of_several_settings_objects_are_collected() -> None:
    with collect_problems() as collected:
        for prefix in ("rollout.", "loss."):
            problems = Problems(prefix)
            problems.positive(size=0)
            problems.raise_all("GRPO")
    assert collected == ["rollout.size=0 must be greater than 0", "loss.size=0 must be greater than 0"]
    with pytest.raises(ValueError, match=r"GRPO: loss\.size=0"):
        problems.raise_all("GRPO")


def test_an_error_inside_ends_the_collecting() -> None:
    with pytest.raises(KeyError), collect_problems():
        raise KeyError
    problems = Problems()
    problems.positive(size=0)
    with pytest.raises(ValueError, match="size=0"):
        problems.raise_all("GRPO")
