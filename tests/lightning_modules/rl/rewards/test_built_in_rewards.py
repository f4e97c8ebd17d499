"""The rewards that come with the project: against slow references, and within their stated range for any text."""

from __future__ import annotations

import inspect
import itertools
import math
import random
import re
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.samples.answer_text import render_answer
from datamodules.samples.box_matching import BoxMatching, WrittenBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, BoxesAnswer
from lightning_modules.grpo import GRPO
from lightning_modules.rl.grpo_settings import RolloutSettings
from lightning_modules.rl.rewards import box_rewards, text_rewards
from lightning_modules.rl.rewards.box_overlaps import overlap
from lightning_modules.rl.rewards.box_rewards import BoxMatch, CIoU, DIoU, GIoU, IoU, IoUAbove, RightImage
from lightning_modules.rl.rewards.completion import Completion
from lightning_modules.rl.rewards.judge import Judge
from lightning_modules.rl.rewards.reward_list import RewardList
from lightning_modules.rl.rewards.text_rewards import Format, Length, Repetition, SoftOverlong
from tests.datamodules.samples.hostile_answers import CASES
from tests.documented_metrics import METRICS
from tests.lightning_modules.rl.rewards.completions import make_completion

WIDE = ImageSizes(original=(640, 480), resized=(640, 480))
SECOND = BoxAnswer(image=1, box=(0.0, 0.0, 0.5, 0.5), label="cup")
JUDGE = {"base_url": "http://localhost:8000/v1", "model": "judge"}
ALL = [
    *(IoU(), IoUAbove(), IoUAbove(0.9), GIoU(), DIoU(), CIoU(), RightImage(), Format()),
    *(BoxMatch(measure, threshold) for measure in ("f1", "precision", "recall") for threshold in (0.0, 0.5)),
    *(
        SoftOverlong(margin=8),
        SoftOverlong(margin=16, limit=16),
        Length(4, 8),
        Length(0, 1),
        Repetition(),
        Repetition(1),
    ),
]


def complete(text: str, **more) -> Completion:
    return make_completion(text, SECOND, [WIDE, WIDE], **more)


def two_boxes(*boxes: list[float]) -> str:
    return "<think>t</think><answer>" + str([{"bbox_2d": box} for box in boxes]).replace("'", '"') + "</answer>"


def test_the_list_of_these_tests_holds_every_reward():
    classes = {
        found
        for module in (box_rewards, text_rewards)
        for name, found in vars(module).items()
        if inspect.isclass(found) and found.__module__ == module.__name__ and not name.startswith("_")
    }
    assert {type(reward) for reward in ALL} == classes
    assert all(reward.range[0] < reward.range[1] and "." in type(reward).__doc__ for reward in ALL)


def test_the_page_of_metrics_has_every_reward_with_its_range():
    rows = re.findall(r"(?m)^\| `(\w+)\.(\w+)` \| (\S+) to (\S+) \|", METRICS.read_text())
    stated = {(f"lightning_modules.rl.rewards.{module}", name): (float(a), float(b)) for module, name, a, b in rows}
    ranges = {(type(each).__module__, type(each).__name__): each.range for each in ALL}
    assert stated == ranges | {(Judge.__module__, "Judge"): Judge.range}


def entries() -> list[dict]:
    """Every reward of `ALL` as an entry of a YAML."""
    found = []
    for number, reward in enumerate(ALL):
        arguments = {name: getattr(reward, name) for name in inspect.signature(type(reward)).parameters}
        path = f"{type(reward).__module__}.{type(reward).__name__}"
        found.append({"class_path": path, "init_args": arguments, "name": f"r{number}"})
    return found


REWARDS = RewardList(entries())
numbers = st.one_of(
    st.floats(allow_nan=True), st.integers(-(10**30), 10**30), st.sampled_from([0, -0.0, 1e308, 5e-324])
)
box_texts = st.lists(numbers, min_size=4, max_size=4).map(lambda box: f'{{"bbox_2d": {box}, "label": "cup"}}')
pieces = st.one_of(
    st.text(max_size=30),
    box_texts,
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "```json\n", "\n```", "[", "]", '"image": 2', "{"]
    ),
    st.sampled_from([case[0][:5000] for case in CASES]),
)
texts = st.lists(pieces, max_size=8).map("".join)
true_boxes = st.sampled_from(
    [(0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 1e-9, 1e-9), (0.999, 0.999, 1.0, 1.0)]
)


@settings(max_examples=300, deadline=None)
@given(texts, true_boxes, st.lists(st.integers(0, 9), max_size=40), st.sampled_from(list(BoxFormat)))
def test_no_text_takes_a_reward_out_of_its_range(text, box, token_ids, box_format):
    """`RewardList` raises where a value is not finite, or outside."""
    answer = BoxAnswer(1, box, "cup")
    completion = make_completion(text, answer, [WIDE, WIDE], box_format, token_ids=token_ids, max_tokens=40)
    assert REWARDS.problems == []
    (got,) = REWARDS.score_completions([[completion]])[0]
    for reward, value in zip(ALL, got.terms.values(), strict=True):
        assert reward.range[0] <= value <= reward.range[1]


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_overlaps_rank_misses_that_the_iou_does_not(kind):
    reward = {"giou": GIoU(), "diou": DIoU(), "ciou": CIoU()}[kind]
    near, far = (complete(render_answer(box, "cup", "t")) for box in ([330, 10, 500, 200], [500, 300, 600, 470]))
    assert IoU()(near) == IoU()(far) == 0.0
    assert 1 > reward(near) > reward(far) > reward(complete("no box")) == reward.range[0]
    assert reward(near) == overlap(kind, near.score.box, SECOND.box)
    assert reward(complete(render_answer([0, 0, 320, 240], "cup", "t"))) == pytest.approx(1.0, abs=1e-9)


def test_an_iou_counts_from_its_threshold_on():
    half = complete(render_answer([0, 0, 320, 480], "cup", "t"))  # IoU 0.5
    assert [IoUAbove(threshold)(half) for threshold in (0.0, 0.49, 0.5, 0.9)] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"image": 2, "bbox_2d": [0, 0, 9, 9]}', 1.0),
        ('{"image": 1, "bbox_2d": [0, 0, 9, 9]}', 0.0),
        ('[{"image": 2, "bbox_2d": [0, 0, 9, 9]}, {"image": 1, "bbox_2d": [0, 0, 9, 9]}]', 0.0),
        ('{"bbox_2d": [0, 0, 9, 9]}', 0.0),
        ('{"image": 99999, "bbox_2d": [0, 0, 9, 9]}', 0.0),
    ],
)
def test_the_right_image_is_named_in_the_answer_and_no_other(answer, expected):
    text = f'<think>"image": 1</think><answer>{answer}</answer>'
    assert RightImage()(complete(text)) == expected


def slow_pairs(written, true, threshold):
    """Every assignment of written boxes to the true ones."""
    places = [*range(len(written)), *[None] * len(true)]
    best = 0
    for chosen in set(itertools.permutations(places, len(true))):
        pairs = [(written[k], answer) for k, answer in zip(chosen, true, strict=True) if k is not None]
        best = max(best, sum(w.image == t.image and overlap("iou", w.box, t.box) > threshold for w, t in pairs))
    return best


def test_the_matching_is_the_largest_of_all():
    rng = random.Random(0)

    def box():
        x, y = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
        return x, y, x + rng.uniform(0.2, 0.4), y + rng.uniform(0.2, 0.4)

    sizes = set()
    for _ in range(60):
        written = [WrittenBox(rng.randrange(2), box(), None) for _ in range(rng.randrange(5))]
        true = [BoxAnswer(rng.randrange(2), box(), "") for _ in range(rng.randrange(1, 4))]
        found = BoxMatching(tuple(written), tuple(true)).num_pairs(0.05)
        assert found == slow_pairs(written, true, 0.05)
        sizes.add(found)
    assert len(sizes) >= 3


def test_further_boxes_cost_precision_and_missing_ones_recall():
    right, wrong = [0, 0, 320, 240], [400, 300, 500, 400]
    true = BoxesAnswer((SECOND, BoxAnswer(1, (0.5, 0.5, 1.0, 1.0), "cup")))
    for text, answer, expected in (
        (two_boxes(wrong, right), SECOND, {"precision": 0.5, "recall": 1.0, "f1": 2 / 3}),
        (two_boxes(right, right), true, {"precision": 0.5, "recall": 0.5, "f1": 0.5}),
        (two_boxes(right), true, {"precision": 1.0, "recall": 0.5, "f1": 2 / 3}),
        (two_boxes(right, [320, 240, 640, 480]), true, {"precision": 1.0, "recall": 1.0, "f1": 1.0}),
    ):
        completion = make_completion(text, answer, [WIDE, WIDE])
        for measure, value in expected.items():
            assert BoxMatch(measure)(completion) == pytest.approx(value)


def test_overlong_is_equation_13_of_dapo():
    """0 up to L_max - L_cache, ((L_max - L_cache) - |y|) / L_cache up to L_max, then -1."""
    limit, cache = 40, 16
    for length in range(1, 60):
        if length <= limit - cache:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - cache) - length) / cache
        else:
            expected = -1.0
        completion = complete("text", token_ids=range(length), max_tokens=limit)
        assert SoftOverlong(margin=cache)(completion) == expected
        assert SoftOverlong(margin=cache, limit=limit)(complete("", token_ids=range(length))) == expected


def test_a_length_outside_earns_its_quotient():
    found = [Length(4, 8)(complete("", token_ids=range(length))) for length in (0, 2, 4, 8, 16)]
    assert found == [0.0, 0.5, 1.0, 1.0, 0.5]


def test_repeated_tokens_cost_their_share():
    ids = [1, 2, 3, 1, 2, 3, 4]  # pairs: 12 23 31 12 23 34, two of them again
    assert Repetition(2)(complete("", token_ids=ids)) == pytest.approx(-2 / 6)
    assert Repetition(2)(complete("", token_ids=[5])) == 0.0
    assert Repetition(1)(complete("", token_ids=[7] * 10)) == pytest.approx(-0.9)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda: IoUAbove(1.0), r"threshold=1.0 must be a number in \[0, 1\)"),
        (lambda: IoUAbove(math.nan), r"threshold=nan must be a number in \[0, 1\)"),
        (lambda: IoUAbove(False), r"threshold=False must be a number in \[0, 1\)"),
        (lambda: BoxMatch(threshold="0.5"), r"threshold='0.5' must be a number in \[0, 1\)"),
        (lambda: BoxMatch("accuracy"), "measure='accuracy' must be one of"),
        (lambda: SoftOverlong(margin=8, limit=4), "limit=4 must be at least margin"),
        (lambda: Length(9, 4), "longest=4 must be at least shortest"),
        *(
            (
                partial(reward, **arguments | {name: value}),
                f"{name}={value!r} must be a whole number of at least {least}",
            )
            for reward, arguments, name, least in (
                (Repetition, {}, "n", 1),
                (SoftOverlong, {}, "margin", 1),
                (SoftOverlong, {"margin": 1}, "limit", 0),
                (Length, {"longest": 8}, "shortest", 0),
                (Length, {"shortest": 0}, "longest", 1),
                (Judge, JUDGE, "max_tokens", 1),
                (Judge, JUDGE, "attempts", 1),
                (Judge, JUDGE, "concurrency", 1),
            )
            for value in (least - 1, 1.5, 2.0, True, math.nan, math.inf, "2")
        ),
        *(
            (partial(Judge, **JUDGE | {name: value}), f"{name}={value!r} must be a finite number greater than 0")
            for name in ("highest", "timeout")
            for value in (0, -1.0, True, math.nan, math.inf, "2")
        ),
        (partial(Judge, **JUDGE | {"base_url": None}), "base_url=None must be the address of the server"),
        (partial(Judge, **JUDGE | {"model": 7}), "model=7 must be the server's name of the model"),
        (partial(Judge, **JUDGE | {"prompt": ["{text}"]}), "must be a text with the place {text}"),
    ],
)
def test_arguments_that_cannot_work_are_named(reward, words):
    with pytest.raises(ValueError, match=words):
        reward()


TEXT_REWARDS = "lightning_modules.rl.rewards.text_rewards."


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("SoftOverlong", {"margin": 161}, "margin=161 must be at most the limit, which is rollout.max_new_tokens=160"),
        ("SoftOverlong", {"margin": 160}, None),
        ("SoftOverlong", {"margin": 161, "limit": 161}, None),
        ("Length", {"shortest": 161, "longest": 200}, "shortest=161 must be at most rollout.max_new_tokens=160"),
        ("Length", {"shortest": 160, "longest": 200}, None),
    ],
)
def test_arguments_that_cannot_work_at_the_length_limit_of_the_run_are_named(name, arguments, words):
    entries = [{"class_path": TEXT_REWARDS + name, "init_args": arguments}]
    assert RewardList(entries).problems == [], "without a run, the limit is not known"
    found = RewardList(entries, max_new_tokens=160).problems
    assert found == ([f"rewards[0].class_path='{TEXT_REWARDS}{name}': {words}"] if words else [])


def test_a_module_of_grpo_refuses_them_before_it_loads_weights():
    entries = [{"class_path": TEXT_REWARDS + "SoftOverlong", "init_args": {"margin": 400}}]
    words = "margin=400 must be at most the limit, which is rollout.max_new_tokens=160"
    with pytest.raises(ValueError, match=re.escape(words)):
        GRPO("no/such-model", rollout=RolloutSettings(max_new_tokens=160), rewards=entries)


def test_a_completion_reads_its_text_once_and_gives_every_images_boxes():
    true = BoxesAnswer((SECOND, BoxAnswer(0, (0.1, 0.1, 0.2, 0.2), "mug")))
    completion = make_completion(two_boxes([0, 0, 320, 240]), true, [WIDE, WIDE])
    assert completion.true_boxes == true.boxes and completion.question == "Where is the cup?"
    assert completion.boxes == (WrittenBox(1, (0.0, 0.0, 0.5, 0.5), None),) and completion.boxes is completion.boxes
    assert completion.thinking == "t" and completion.finish_reason == "stop"
    assert math.isclose(complete(two_boxes([0, 0, 320, 240])).score.iou, 1.0)
