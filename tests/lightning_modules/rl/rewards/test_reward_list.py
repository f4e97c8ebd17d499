"""The reward of eq. 3 against numbers worked out by hand, peers' reward bugs that must not come back, and lists of
rewards: what is summed, what is refused, and how a reward that fails is told."""

import math
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from datamodules.samples.answer_text import AnswerForm, render_answer, render_boxes
from datamodules.samples.box_texts import ParsedBox
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer
from lightning_modules.rl.rewards.completion import Completion, Failed
from lightning_modules.rl.rewards.reward_list import PAPER, Reward, RewardError, RewardList
from lightning_modules.rollouts.base import Rollout
from tests.lightning_modules.rl.rewards.completions import make_completion

HERE = "tests.lightning_modules.rl.rewards.test_reward_list"
WIDE = ImageSizes(original=(640, 480), resized=(640, 480))
SMALL = ImageSizes(original=(100, 100), resized=(112, 56))
HALF = BoxAnswer(image=0, box=(0.0, 0.0, 0.5, 0.5), label="cup")


def reward(text: str, true: BoxAnswer, image_sizes, box_format, weights=None) -> Reward:
    """Eq. 3 for one text."""
    completion = make_completion(text, true, image_sizes, box_format)
    return RewardList(weights=weights).score_completions([[completion]])[0][0]


def answer(values, thinking="left of the cup"):
    return render_answer(values, "cup", thinking)


def reference_iou(a, b, steps=480):
    """Counts grid cells, so shares nothing with the shipped formula."""
    centres = [(i + 0.5) / steps for i in range(steps)]
    columns = [(a[0] < x < a[2], b[0] < x < b[2]) for x in centres]
    rows = [(a[1] < y < a[3], b[1] < y < b[3]) for y in centres]
    both = sum(c[0] and c[1] for c in columns) * sum(r[0] and r[1] for r in rows)
    only_a = sum(c[0] for c in columns) * sum(r[0] for r in rows)
    only_b = sum(c[1] for c in columns) * sum(r[1] for r in rows)
    return both / (only_a + only_b - both)


@pytest.mark.parametrize("values", [[0, 0, 320, 240], [160, 120, 480, 360], [0, 0, 640, 480], [32, 48, 400, 200]])
def test_accuracy_is_the_iou_of_the_parsed_box(values):
    unit = [values[0] / 640, values[1] / 480, values[2] / 640, values[3] / 480]
    got = reward(answer(values), HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert got.terms["accuracy"] == pytest.approx(reference_iou(HALF.box, unit), abs=1e-9)
    assert got.terms["format"] == 1.0 and got.failure is None
    assert got.total == pytest.approx(got.terms["accuracy"] + 0.5)


def test_weights_of_equation_3():
    text = answer([0, 0, 320, 480])  # twice the area of the target: IoU 1/2
    got = reward(text, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS, {"accuracy": 3.0, "format": 0.25})
    assert got.total == pytest.approx(3.0 * 0.5 + 0.25)


def test_the_form_of_the_prompt_decides_how_an_answer_is_read():
    """`EncodedSample.answer_form`: with named images, the right box in the wrong image earns nothing."""
    texts = [render_boxes([ParsedBox((0, 0, 320, 240), "cup", image)], "t") for image in (1, 2)]
    sample = make_completion("", HALF, [WIDE, WIDE]).sample
    rollouts = [[Rollout(torch.arange(2), torch.zeros(2), True, text) for text in texts]]
    for form, expected in ((AnswerForm.ONE_BOX, [1.5, 1.5]), (AnswerForm.NAMED_IMAGE, [1.5, 0.5])):
        item = SimpleNamespace(sample=sample, image_sizes=[WIDE, WIDE], answer_form=form)
        (group,) = RewardList().score([item], rollouts, BoxFormat.ABSOLUTE_PIXELS, 8)
        assert [found.total for found in group] == expected
        assert [found.is_right for found in group] == [total > 1 for total in expected]


def test_an_overlap_of_two_boxes_refuses_several():
    entries = [{"class_path": "lightning_modules.rl.rewards.box_rewards.GIoU"}]
    completion = make_completion(answer([0, 0, 9, 9]), HALF, [WIDE], answer_form=AnswerForm.NAMED_IMAGE)
    with pytest.raises(RewardError, match="GIoU compares one box with one"):
        RewardList(entries).score_completions([[completion]])


def test_without_tags_the_box_counts_but_the_format_does_not():
    got = reward(answer([0, 0, 320, 240], thinking=None), HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert (got.terms["accuracy"], got.terms["format"], got.total) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("text", ["", "<", "<|", "< think >", "I see a cup.", "<think>x</think>", "<answer></answer>"])
def test_text_without_a_box_earns_nothing_and_names_the_failure(text):
    """FIELD 5: peers pay the format reward, or even points for accuracy, for such text."""
    got = reward(text, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert (got.total, got.terms["accuracy"], got.terms["format"]) == (0.0, 0.0, 0.0)
    assert got.failure is not None


def test_truncated_completion_earns_what_its_text_earns():
    whole = answer([0, 0, 320, 240])
    for cut in range(len(whole)):
        assert reward(whole[:cut], HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["format"] == 0.0
    assert reward(whole[: whole.index("```json")], HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).total == 0.0


def test_identical_one_pixel_boxes_score_one_and_empty_ones_zero():
    """FIELD 4: inclusive and exclusive pixels mixed scored 0 for the first and divided by zero for the second."""
    thin = BoxAnswer(image=0, box=(10 / 640, 10 / 480, 11 / 640, 20 / 480), label="")
    assert reward(answer([10, 10, 11, 20]), thin, [WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == pytest.approx(
        1.0
    )
    empty = reward(answer([10, 10, 10, 10]), thin, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert empty.terms["accuracy"] == 0.0 and empty.terms["format"] == 0.0 and not math.isnan(empty.total)


def test_target_image_gives_the_geometry():
    """FIELD 1 and 7: the same text means another box in another image; the answer says which image is meant."""
    in_second = BoxAnswer(image=1, box=(0.25, 0.5, 0.75, 1.0), label="cup")
    text = answer([28, 28, 84, 56])  # 112 x 56 pixels: exactly the box; in the 640 x 480 image far from it
    assert reward(text, in_second, [WIDE, SMALL], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == pytest.approx(1.0)
    assert reward(text, in_second, [SMALL, WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == 0.0


def test_convention_is_not_guessed_from_the_numbers():
    """FIELD 6 and 7: numbers below 1000 are per mille only for a model that writes per mille."""
    assert reward(answer([0, 0, 320, 240]), HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS).terms["accuracy"] == pytest.approx(
        1.0
    )
    assert reward(answer([0, 0, 500, 500]), HALF, [WIDE], BoxFormat.RELATIVE_1000).terms["accuracy"] == pytest.approx(
        1.0
    )
    relative_1000 = reward(answer([0, 0, 320, 240]), HALF, [WIDE], BoxFormat.RELATIVE_1000)
    assert relative_1000.terms["accuracy"] == pytest.approx(0.32 * 0.24 / 0.25)


def test_further_boxes_do_not_raise_the_reward():
    boxes = '<think>t</think><answer>[{"bbox_2d": [400, 300, 500, 400]}, {"bbox_2d": [0, 0, 320, 240]}]</answer>'
    got = reward(boxes, HALF, [WIDE], BoxFormat.ABSOLUTE_PIXELS)
    assert (got.terms["accuracy"], got.terms["format"]) == (0.0, 0.0)


# Rewards of a user


def words(completion: Completion) -> float:
    return len(completion.text.split())


def ends_in(completion: Completion, mark: str = ".") -> bool:
    return completion.text.endswith(mark)


def not_a_number(completion: Completion) -> float:
    return math.nan


def nothing(completion: Completion) -> None:
    """Forgets its return."""


def broken(completion: Completion) -> float:
    return {}["box"]


def huge(completion: Completion) -> int:
    return 10**400


def chatty(completion: Completion) -> float:
    raise RuntimeError("\n".join(f"line {number}" for number in range(1000)))


def graded(completion: Completion, grade: float) -> float:
    return grade


graded.range = (0, 1)


def unbounded(completion: Completion) -> float:
    return math.inf


unbounded.range = (0, math.inf)


class Backwards:
    range = (1, 0)

    def __call__(self, completion: Completion) -> float:
        return 0.0


class Single:
    def score_batch(self, completions: list[Completion]) -> float:
        return 1.0


class Half:
    """States its range, and leaves it."""

    range = (0.0, 0.5)

    def __call__(self, completion: Completion) -> float:
        return 0.75


class Together:
    """Scores all completions at once, and cannot judge those without a word."""

    def __init__(self, missing: float | None = None, spare: int = 0) -> None:
        self.missing, self.spare = missing, spare

    def score_batch(self, completions: list[Completion]) -> list[float | Failed]:
        found = [float(len(each.text)) if each.text else Failed(self.missing) for each in completions]
        return found + [0.0] * self.spare


NOT_A_REWARD = 3


def score(entries, texts, **weights):
    """One group of these texts."""
    rewards = RewardList(entries, weights)
    assert rewards.problems == []
    return rewards.score_completions([[make_completion(text, HALF, [WIDE]) for text in texts]])[0]


def entry(attribute, **more):
    return {"class_path": f"{HERE}.{attribute}", **more}


def test_the_sum_is_weighted_and_every_reward_is_in_the_record():
    entries = [*PAPER, entry("words", weight=0.25), entry("ends_in", name="ends", init_args={"mark": "!"}, weight=0.0)]
    (got,) = score(entries, ["two words!"], words=2.0)
    assert got.terms == {"accuracy": 0.0, "format": 0.0, "words": 2.0, "ends": 1.0} and got.total == 4.0
    assert got.to_json() == {"total": 4.0, **got.terms, "failure": got.failure}
    assert RewardList(entries, {"ends": 3.0}).weights == {"accuracy": 1.0, "format": 0.5, "words": 0.25, "ends": 3.0}


def test_the_default_is_equation_3():
    assert RewardList().weights == {"accuracy": 1.0, "format": 0.5}
    assert RewardList(weights={"format": 0.0}).weights == {"accuracy": 1.0, "format": 0.0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_a_number", "returned nan; it must return a finite number"),
        ("nothing", "returned None, of type NoneType; it must return a number"),
        ("broken", "raised KeyError: 'box' at test_reward_list.py, line"),
        ("huge", "returned 1000"),
        ("chatty", "raised RuntimeError: line 0 line 1"),
        ("Single", "returned 1.0 from score_batch; it must return a list"),
        ("Half", "returned 0.75; it must return a finite number in its range, 0 to 0.5"),
        ("unbounded", "returned inf; it must return a finite number in its range, 0 to inf"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_sample(name, words):
    with pytest.raises(RewardError) as caught:
        score([entry(name)], ["some text"])
    message = str(caught.value)
    assert f"reward {name.lower()!r} ({HERE}.{name}) {words}" in message
    assert "sample 'pool/17'" in message and "some text" in message and len(message.splitlines()) <= 5


def test_a_batch_with_another_number_of_values_is_an_error():
    with pytest.raises(RewardError, match="score_batch gave 3 values for 2 completions"):
        score([entry("Together", init_args={"spare": 1})], ["a", "b"])


def test_a_failure_with_a_value_counts_as_this_value():
    whole, empty = score([entry("Together", init_args={"missing": 0.0})], ["abc", ""])
    assert (whole.total, empty.total) == (3.0, 0.0) and not whole.left_out and not empty.left_out
    assert (whole.failed, empty.failed) == ((), ("together",)) and empty.to_json()["failed"] == ["together"]


def test_a_failure_without_a_value_leaves_its_group_out_and_no_other():
    rewards = RewardList([entry("Together")])
    groups = [[make_completion(text, HALF, [WIDE]) for text in texts] for texts in (["abc", ""], ["a", "bc"])]
    first, second = rewards.score_completions(groups)
    assert [each.total for each in first] == [0.0, 0.0] and all(each.left_out for each in first)
    assert all(each.to_json()["left_out"] for each in first), "a page shows no reward of 0"
    assert [each.terms["together"] for each in first] == [3.0, None]
    assert [each.total for each in second] == [1.0, 2.0] and not any(each.left_out for each in second)


def test_a_failure_of_a_reward_that_is_only_logged_leaves_no_group_out():
    first, second = score([*PAPER, entry("Together", weight=0.0)], [answer([0, 0, 320, 240]), ""])
    assert (first.total, second.total) == (1.5, 0.0) and not first.left_out and not second.left_out
    assert second.terms["together"] is None and second.failed == ("together",)


def test_every_problem_of_a_list_is_named_with_its_cure():
    entries = [
        entry("word"),
        {"class_path": "no_such_rewards.Short"},
        {"class_path": "Shorter"},
        entry("NOT_A_REWARD"),
        entry("ends_in", init_args={"marks": "!"}),
        entry("words"),
        entry("words", weight=math.inf),
        entry("words", name="total"),
        {"class_path": "lightning_modules.rl.rewards.text_rewards.SoftOverlong", "init_args": {"margin": 0}},
        entry("Backwards"),
        entry("BoxAnswer", name="record", init_args={"image": 0, "box": (0, 0, 1, 1), "label": ""}),
    ]
    faults = RewardList(entries, {"lenght": 1.0}).problems
    for words in (
        f"rewards[0].class_path='{HERE}.word': {HERE} has no word; did you mean words?",
        "rewards[1].class_path='no_such_rewards.Short': there is no module no_such_rewards; put no_such_rewards.py "
        "beside the YAML, or into the working directory",
        "rewards[2].class_path='Shorter': write module.Class or module.function",
        f"rewards[3].class_path='{HERE}.NOT_A_REWARD': is of type int; a reward is a class or a function",
        "unexpected keyword argument 'marks' (init_args; it takes mark)",
        "name='words': 2 rewards have this name; give each its own with name: …",
        "rewards.words.weight=inf must be a finite number",
        "name='total' is no name: letters, digits and _, but not total, failure, failed, left_out",
        "init_args={'margin': 0}: margin=0 must be a whole number of at least 1",
        f"{HERE}.Backwards': range=(1, 0) must be two numbers, the lower one first",
        "BoxAnswer has neither __call__(completion) nor score_batch(completions)",
        "reward_weights.lenght=1.0: there is no such reward; the rewards are word, ",
    ):
        assert sum(words in fault for fault in faults) == 1, (words, faults)
    assert len(faults) == 12


def test_a_function_states_its_range_as_an_attribute():
    assert score([entry("graded", init_args={"grade": 0.5})], ["a"])[0].total == 0.5
    with pytest.raises(
        RewardError, match=r"reward 'graded' .* returned 2; it must return a finite number in its range, 0 to 1"
    ):
        score([entry("graded", init_args={"grade": 2})], ["a"])


@pytest.mark.parametrize("entries", [[], [{**each, "weight": 0.0} for each in PAPER]])
def test_a_list_that_rewards_nothing_is_refused(entries):
    (fault,) = RewardList(entries).problems
    assert fault.startswith("rewards: every reward would be 0 with") and "give one of them a weight" in fault


def test_a_user_file_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "typo_rewards.py").write_text("def short(completion)\n    return 1\n")
    (tmp_path / "needy_rewards.py").write_text("import no_such_package\n")
    faults = RewardList([{"class_path": "typo_rewards.short"}, {"class_path": "needy_rewards.short"}]).problems
    assert "typo_rewards cannot be imported: SyntaxError" in faults[0]
    assert "needy_rewards imports no_such_package, which is not installed" in faults[1]


def test_a_list_can_be_sent_to_another_process():
    rewards = RewardList([*PAPER, entry("ends_in", init_args={"mark": "!"}), entry("Together")])
    again = pickle.loads(pickle.dumps(rewards))
    completion = make_completion("yes!", HALF, [WIDE])
    assert again.score_completions([[completion]]) == rewards.score_completions([[completion]])


@dataclass
class Unhashable:
    """A class as users write it: a dataclass with `eq`, so its objects have no hash."""

    scales: list[float] = field(default_factory=lambda: [0.25])

    def __call__(self, completion: Completion) -> float:
        return self.scales[0]


def test_a_reward_whose_objects_have_no_hash_is_summed_like_any_other():
    rewards = RewardList([{"class_path": f"{HERE}.Unhashable", "weight": 2.0}])
    (got,) = rewards.score_completions([[make_completion("text", HALF, [WIDE])]])[0]
    assert got.total == 0.5 and got.terms == {"unhashable": 0.25}


def test_rewards_that_cannot_judge_a_form_are_named():
    rewards = RewardList([*PAPER, {"class_path": "lightning_modules.rl.rewards.box_rewards.GIoU"}])
    assert rewards.form_faults(AnswerForm.ONE_BOX) == []
    (fault,) = rewards.form_faults(AnswerForm.NAMED_IMAGE)
    assert "reward 'giou' (lightning_modules.rl.rewards.box_rewards.GIoU) compares one box with one" in fault
