"""Rewordings ask for the same image or region as the question they replace."""

from __future__ import annotations

import random

import pytest

from datamodules.synthetic.question_wordings import REWORDINGS, reworded
from datamodules.synthetic.tasks import make_puzzle

WORDS = {1: "first", 2: "second", 3: "third", 4: "fourth"}


@pytest.mark.parametrize("task", REWORDINGS)
def test_all_wordings_are_used_and_none_leaves_a_gap(task: str) -> None:
    questions = {reworded(random.Random(seed), make_puzzle(random.Random(seed), task))[0] for seed in range(200)}
    assert not any("{" in question for question in questions)
    starts = {question[:12] for question in questions}
    assert len(starts) == len(REWORDINGS[task]) + 1


@pytest.mark.parametrize("task", ["common_object", "region"])
def test_the_number_asked_for_is_the_puzzle_s(task: str) -> None:
    checked = 0
    for seed in range(120):
        puzzle = make_puzzle(random.Random(seed), task)
        number = puzzle.target + 1
        if task == "region":  # the crop of the thing asked for, counted from 1, behind the source image
            number = puzzle.crops.index(puzzle.box)
        question, _ = reworded(random.Random(seed + 1), puzzle)
        if "what picture" in question:
            assert f"picture {number + 1} " in question
        else:
            assert str(number) in question or f"the {WORDS[number]} " in question
        checked += question != puzzle.question
    assert checked > 60
