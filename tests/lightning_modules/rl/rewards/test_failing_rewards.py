"""Rewards of a user that fail: in their constructor, in their range, in what `score_batch` returns, and by a sum
that is too large. Each is told with its entry, or with reward and sample."""

import math
import re
from collections.abc import Iterator

import pytest
import torch

from datamodules.persistence.problems import collect_problems
from datamodules.persistence.user_error import UserError
from datamodules.samples.boxes import ImageSizes
from datamodules.samples.sample import BoxAnswer
from lightning_modules.rl.advantages import group_advantages
from lightning_modules.rl.rewards.completion import Completion, Failed
from lightning_modules.rl.rewards.reward_list import LARGEST, PAPER, RewardError, RewardList
from tests.lightning_modules.rl.rewards.completions import make_completion

HERE = "tests.lightning_modules.rl.rewards.test_failing_rewards"
REPETITION = "lightning_modules.rl.rewards.text_rewards.Repetition"
WIDE = ImageSizes(original=(640, 480), resized=(640, 480))
HALF = BoxAnswer(image=0, box=(0.0, 0.0, 0.5, 0.5), label="cup")


class ByNumber:
    """Returns its values in another container than a list."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def score_batch(self, completions: list[Completion]) -> object:
        kinds = {
            "dict": dict.fromkeys,
            "set": set,
            "frozenset": frozenset,
            "dict_keys": lambda n: dict.fromkeys(n).keys(),
        }
        kinds |= {"str": lambda n: "1" * len(n), "bytes": lambda n: bytes(len(n)), "tuple": tuple, "generator": iter}
        return kinds[self.kind](range(len(completions)))


class Lazy:
    """Yields its values, and cannot judge an empty text."""

    def score_batch(self, completions: list[Completion]) -> Iterator[float]:
        for completion in completions:
            yield 1 / len(completion.text)


class Nested:
    def __call__(self, completion: Completion) -> Failed:
        return Failed(Failed(1.0))


class OwnRange:
    """Sets its range itself."""

    def __init__(self, range: object, later: object = None) -> None:
        self.range, self.later = range, later

    def __call__(self, completion: Completion) -> float:
        self.range = self.later or self.range
        return 0.75


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completion: Completion) -> float:
        return self.value


class Signed:
    """The largest reward, positive or negative."""

    def __call__(self, completion: Completion) -> float:
        return LARGEST if completion.text == "+" else -LARGEST


class Stubborn:
    """Its constructor raises an error."""

    def __init__(self, kind: str, text: str = "a") -> None:
        raise {"key": KeyError, "file": FileNotFoundError, "user": UserError, "assert": AssertionError}[kind](text)

    def __call__(self, completion: Completion) -> float:
        return 0.0


def score(entries, texts):
    """One group of these texts."""
    rewards = RewardList(entries)
    assert rewards.problems == []
    return rewards.score_completions([[make_completion(text, HALF, [WIDE]) for text in texts]])[0]


def entry(attribute, **more):
    return {"class_path": f"{HERE}.{attribute}", **more}


def test_a_failure_inside_a_failure_is_no_number():
    words = "returned Failed(value=Failed(value=1.0)), of type Failed; it must return a number"
    with pytest.raises(RewardError, match=re.escape(words)):
        score([entry("Nested")], ["some text"])


@pytest.mark.parametrize("kind", ["dict", "dict_keys", "set", "frozenset", "str", "bytes"])
def test_a_batch_in_a_container_that_is_no_list_is_refused(kind):
    """The keys of {0: 0.0, 1: 0.0} would be trained on as rewards."""
    with pytest.raises(RewardError) as caught:
        score([entry("ByNumber", init_args={"kind": kind})], ["some text", "b"])
    message = str(caught.value)
    assert f"it must return a list of numbers, one for each completion, not {kind}" in message
    assert "reward 'bynumber'" in message and "sample 'pool/17'" in message and "some text" in message


@pytest.mark.parametrize("kind", ["tuple", "generator"])
def test_a_batch_may_be_a_tuple_or_a_generator(kind):
    found = score([entry("ByNumber", init_args={"kind": kind})], ["a", "b", "c"])
    assert [each.total for each in found] == [0.0, 1.0, 2.0]
    assert RewardList([entry("ByNumber", init_args={"kind": kind})]).score_completions([]) == []


def test_a_generator_that_raises_is_named_with_the_sample():
    with pytest.raises(RewardError) as caught:
        score([entry("Lazy")], ["some text", ""])
    message = str(caught.value)
    assert (
        f"reward 'lazy' ({HERE}.Lazy) raised ZeroDivisionError: division by zero at test_failing_rewards.py" in message
    )
    assert "sample 'pool/17'" in message and len(message.splitlines()) <= 5


@pytest.mark.parametrize("stated", [1.0, (1.0,), (1.0, 0.0), ("0", "1"), (0.0, math.nan), "01"])
def test_a_range_that_the_constructor_sets_is_checked(stated):
    (fault,) = RewardList([entry("OwnRange", init_args={"range": stated})]).problems
    assert fault.startswith(f"rewards[0].class_path='{HERE}.OwnRange': range=")
    assert fault.endswith("must be two numbers, the lower one first")


def test_a_range_that_the_constructor_sets_holds():
    assert score([entry("OwnRange", init_args={"range": [0, 1]})], ["a"])[0].total == 0.75
    for init_args, words in (
        ({"range": (0, 0.5)}, "returned 0.75; it must return a finite number in its range, 0 to 0.5"),
        ({"range": (0, 1), "later": 1.0}, "has range=1.0; it must be two numbers, the lower one first"),
    ):
        with pytest.raises(RewardError, match=words):
            score([entry("OwnRange", init_args=init_args)], ["a"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("key", "KeyError: 'a'"),
        ("file", "FileNotFoundError: a"),
        ("user", "UserError: a"),
        ("assert", "AssertionError: a"),
    ],
)
def test_a_constructor_that_raises_is_named(kind, words):
    (fault,) = RewardList([*PAPER, entry("Stubborn", init_args={"kind": kind})]).problems
    where = f"rewards[2].class_path='{HERE}.Stubborn', init_args={{'kind': '{kind}'}}"
    assert fault == f"{where}: its constructor raised {words}"


def test_the_message_of_a_constructor_is_one_line_without_secrets():
    secret = "sk-" + "abcdefgh" * 4
    (fault,) = RewardList([entry("Stubborn", init_args={"kind": "key", "text": f"no {secret}\n" * 9})]).problems
    assert "KeyError" in fault and "abcdefgh" not in fault and len(fault.splitlines()) == 1


def test_a_fault_of_a_reward_names_its_entry_in_a_whole_configuration_too():
    """`experiments.train` collects all problems. Those of a reward must not be there without their entry."""
    entries = [*PAPER, {"class_path": REPETITION, "init_args": {"n": 0}}]
    with collect_problems() as others:
        (fault,) = RewardList(entries).problems
    assert others == []
    assert fault == (
        f"rewards[2].class_path='{REPETITION}', init_args={{'n': 0}}: n=0 must be a whole number of at least 1"
    )


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([(1e29, 100.0)], "returned 1e+29, which has weight 100: the weighted sum of all rewards is 1e+31"),
        ([(9e29, 1.0), (8e29, 1.0)], "returned 9e+29, which has weight 1: the weighted sum of all rewards is 1.7e+30"),
        ([(1e29, -1e300)], "returned 1e+29, which has weight -1e+300: the weighted sum of all rewards is -inf"),
        ([(1e29, 1e300), (1e29, -1e300)], "the weighted sum of all rewards is nan"),
        ([(1e308, 10.0)], "returned 1e+308; it must return a number from -1e+30 to 1e+30"),
    ],
)
def test_a_sum_that_is_too_large_is_named_with_reward_and_sample(terms, words):
    entries = [
        entry("Constant", name=f"r{number}", weight=weight, init_args={"value": value})
        for number, (value, weight) in enumerate(terms)
    ]
    with pytest.raises(RewardError) as caught:
        score(entries, ["some text"])
    message = str(caught.value)
    assert words in message and f"reward 'r0' ({HERE}.Constant)" in message
    assert "sample 'pool/17'" in message and len(message.splitlines()) <= 5


def test_the_largest_rewards_give_finite_advantages():
    totals = torch.tensor([[each.total for each in score([entry("Signed")], ["+", "+", "-"])]], dtype=torch.float64)
    assert totals.abs().min() == LARGEST
    for scale in ("group", "none"):
        assert group_advantages(totals, scale).isfinite().all()
