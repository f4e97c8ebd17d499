from __future__ import annotations

import pytest

from datamodules.persistence import durations
from datamodules.persistence.durations import Outlook, in_words, left_text, own_outlook, stage_prefix


@pytest.fixture(autouse=True)
def at_a_hundred_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations.time, "time", lambda: 100.0)


def within(monkeypatch: pytest.MonkeyPatch, outlook: Outlook) -> None:
    for name, value in outlook.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (89.4, "89 s"), (740, "12 min"), (11100, "3 h 05 min")])
def test_durations_are_written_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_outside_of_a_pipeline_there_is_no_stage() -> None:
    assert own_outlook() is None and stage_prefix() == "" and left_text(45) == "45 s left"


def test_a_process_knows_its_stage_and_the_time_of_all_stages(monkeypatch) -> None:
    outlook = Outlook("2 of 5, sft: training", began=40.0, expected=120.0, later=600.0, evidence=30.0)
    within(monkeypatch, outlook)
    assert own_outlook() == outlook and stage_prefix() == "[2 of 5, sft: training] "
    assert left_text(60) == "60 s left, of all stages 11 min"


def test_a_stage_that_is_slower_than_expected_corrects_the_later_ones() -> None:
    outlook = Outlook("2 of 5", began=40.0, expected=120.0, later=600.0, evidence=30.0)
    # 60 s are over and 270 s are left: 330 s in place of 120 s. With the evidence, the pace is 360 : 150.
    assert outlook.seconds_left(270) == 270 + 600 * 360 / 150
    assert outlook.seconds_left(60) == 60 + 600, "as fast as expected"


def test_a_part_of_a_stage_does_not_hide_the_rest_of_the_stage() -> None:
    outlook = Outlook("4 of 5", began=40.0, expected=570.0, later=30.0)
    assert outlook.seconds_left(10, "rejection sampling") == 570 - 60 + 30, "before the training"
    assert outlook.seconds_left(900, "rejection sampling") > 900, "it takes longer than the whole stage should"


def test_a_part_whose_time_is_expected_corrects_the_rest_of_the_stage() -> None:
    parts = {"rejection sampling": 300.0}
    outlook = Outlook("4 of 5", began=40.0, expected=570.0, later=30.0, parts=parts)
    assert outlook.seconds_left(240, "rejection sampling") == pytest.approx(240 + 270 + 30), "300 s, as expected"
    assert outlook.seconds_left(540, "rejection sampling") == pytest.approx(540 + 2 * (270 + 30)), "600 s"


def test_unknown_times_are_not_guessed(monkeypatch) -> None:
    assert Outlook("1 of 2", 40.0).seconds_left(10) is None
    assert Outlook("1 of 2", 40.0, later=5.0).seconds_left(10, "rejection sampling") is None
    within(monkeypatch, Outlook("1 of 2", 40.0))
    assert left_text(10) == "10 s left"


def test_stages_that_are_alike_take_as_long_as_this_one() -> None:
    assert Outlook("trial 1 of 4", 40.0, later=0.0, alike=3).seconds_left(20) == 20 + 3 * 80
