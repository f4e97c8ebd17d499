"""Hostile answers of several boxes: no exception, rewards in their ranges, bounded work."""

import random
import string
import time

import pytest

from datamodules.samples.answer_text import AnswerForm, render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer
from lightning_modules.rl.rewards.reward_list import RewardList
from tests.lightning_modules.rl.rewards.completions import make_completion

SIZES = [ImageSizes((112, 84), (112, 84)), ImageSizes((84, 84), (84, 84)), ImageSizes((160, 120), (112, 84))]
BOX_REWARDS = "lightning_modules.rl.rewards.box_rewards."
REWARDS = RewardList(
    [
        {"class_path": BOX_REWARDS + "IoU"},
        {"class_path": BOX_REWARDS + "IoUAbove"},
        {"class_path": BOX_REWARDS + "RightImage"},
        *(
            {"class_path": BOX_REWARDS + "BoxMatch", "init_args": {"measure": measure}, "name": measure}
            for measure in ("f1", "precision", "recall")
        ),
        {"class_path": "lightning_modules.rl.rewards.text_rewards.Format"},
    ]
)
PIECES = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "```json\n",
        "```",
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        ":",
        "\n",
        "\\",
    ),
    *('"image": 2, ', '"image": "1", ', '"image": 1e999, ', '"image": -3, ', '"image": [1], ', '"image": null, '),
    *('"bbox_2d": [1, 2, 50, 60]', '"bbox_2d": [[1, 2, 50, 60], [1e999, 2, 3, 4]]', '"bbox_2d": [NaN, 1, 2, 3]'),
    *('{"image": 1, "bbox_2d": [0, 0, 112, 84], "label": "a"},\n', '{"image": 3, "bbox_2d": [9, 9, 5, 5]},'),
    *(
        '"label": "x"',
        "(1,2),(3,4)",
        "<box>1 2 3 4</box>",
        "【１，２，３，４】",
        "\ud800",
        "\x00",
        "9" * 400,
        "Therefore, ",
    ),
]


def random_box(rng):
    x, y = rng.uniform(0, 0.7), rng.uniform(0, 0.7)
    return x, y, x + rng.uniform(0.05, 0.3), y + rng.uniform(0.05, 0.3)


def random_text(rng, answer):
    """A mutated answer, a mixture of pieces, copies of one box, or any characters."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randrange(40)))
    if kind == 1:
        return "".join(rng.choices(string.printable + '<>{}[]",:', k=rng.randrange(300)))
    boxes = []
    for _ in range(rng.choice((1, 2, 3, 5, 8) if kind == 2 else (1, 30))):
        true = rng.choice(answer.boxes)
        values = SIZES[true.image].to_model(true.box, BoxFormat.ABSOLUTE_PIXELS)
        boxes.append(ParsedBox(tuple(value + rng.choice((0, 0, 0, 3)) for value in values), "a", 1 + true.image))
    text = render_boxes(boxes, rng.choice((None, "t", "image 2")))
    for _ in range(rng.choice((0, 0, 1, 2, 8))):
        start = rng.randrange(len(text))
        end = start + rng.choice((0, 1, 1, 5))
        text = text[:start] + rng.choice(("", "", *PIECES)) + text[end:]
    return text or "x"


def check(number):
    """CPU seconds and the terms of one hostile answer."""
    rng = random.Random(f"hostile/{number}")
    true = tuple(BoxAnswer(rng.randrange(3), random_box(rng), "a") for _ in range(rng.choice((1, 2, 3, 4, 5, 6, 17))))
    text = random_text(rng, BoxesAnswer(true))
    more = {"answer_form": AnswerForm.NAMED_IMAGE, "box_format": rng.choice(list(BoxFormat))}
    completion = make_completion(text, BoxesAnswer(true), SIZES, **more)
    started = time.process_time()
    ((reward,),) = REWARDS.score_completions([[completion]])  # raises where a value leaves the range of its reward
    seconds = time.process_time() - started
    assert 0.0 <= reward.iou <= 1.0 and all(0.0 <= value <= 1.0 for value in reward.terms.values()), text
    assert reward.is_right == (reward.terms["f1"] == 1.0) == (reward.terms["iouabove"] == 1.0), text
    assert (reward.iou == 1.0) <= reward.is_right, text
    return seconds, reward


def test_thousands_of_hostile_answers_keep_every_reward_in_its_range():
    assert REWARDS.problems == []
    found = [check(number)[1] for number in range(4_000)]
    assert sum(reward.is_right for reward in found) > 20 and sum(reward.failure is not None for reward in found) > 500
    assert (
        sum(reward.well_formed for reward in found) > 50 and sum(0 < reward.terms["f1"] < 1 for reward in found) > 200
    )


@pytest.mark.slow
def test_a_million_hostile_answers_keep_every_reward_in_its_range():
    """`pytest -s` prints the CPU time of an answer, which is not asserted: it depends on the machine and its load."""
    total, slow = 0.0, []
    for number in range(1_000_000):
        seconds, _ = check(number)
        total += seconds
        if seconds > 1e-3:  # once more, because another process may have slowed the first measurement
            slow.append((min(check(number)[0] for _ in range(5)), number))
    truly = sorted([found for found in slow if found[0] > 1e-3], reverse=True)
    print(f"mean {total * 1e3 / 1_000_000:.4f} ms; above 1 ms once {len(slow)}, each time {len(truly)}: {truly[:5]}")
