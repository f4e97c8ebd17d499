"""Groups that teach nothing are replaced by further prompts: for the same update, within the budget, on all ranks."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback

from lightning_modules.rl.grpo_settings import UpdateSettings
from lightning_modules.rl.refill import RefilledWindow
from lightning_modules.rl.rewards.reward_list import RewardList
from lightning_modules.rl.rollout_batch import PromptGroup
from lightning_modules.training.endings import IdleTooLong
from tests.lightning_modules.conftest import served, trained_weights
from tests.lightning_modules.grpo_modules import Recorder, flat_reward, letters
from tests.lightning_modules.ranks import run_ranks

HARD = {1, 4, 5, 9}  # of ten prompts: at most 40 % of a window's groups teach something


def number_of(item) -> int:
    return int(item.sample.id.rpartition("/")[2])


@pytest.fixture
def pool(make_items, monkeypatch):
    """Ten prompts. Completions of the easy ones are all right; those of the others differ."""

    def score(self, items, rollouts, *_):
        pairs = zip(items, rollouts, strict=True)
        return [
            [letters(each.text) if number_of(item) in HARD else flat_reward(0.9) for each in group]
            for item, group in pairs
        ]

    monkeypatch.setattr(RewardList, "score", score)
    return make_items([1, 2, 1, 1, 2, 1, 1, 1, 2, 1])


class Trained(Callback):
    """Which prompts each window trained on, and how many batches it took."""

    def __init__(self):
        self.prompts, self.batches = [], []

    def on_fit_start(self, trainer, module):
        train = module._train_on_window
        self.module = module

        def noting(by_batch):
            self.prompts.append([number_of(group.item) for groups in by_batch for group in groups])
            self.batches.append(len(by_batch))
            train(by_batch)

        module._train_on_window = noting

    def on_fit_end(self, trainer, module):
        del module._train_on_window


# The window alone


def group(is_informative: bool) -> PromptGroup:
    return PromptGroup(None, None, [], torch.tensor([1.0, -1.0]) * is_informative, [])


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=40, max_size=40),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_a_window_takes_the_first_informative_groups_and_no_more_batches_than_the_budget(batches, accumulate, windows):
    window = RefilledWindow(accumulate, windows, 0, 1, list)
    done, is_open = 0, True
    while is_open:
        round_ = [[group(each) for each in batch] for batch in batches[done : window.num_batches]]
        assert 0 < len(round_) <= accumulate
        window.add(round_, 2 * len(round_))
        done = window.num_batches
        is_open = window.ask_for_more(is_last_batch=False)
    wanted, found = 2 * accumulate, sum(map(sum, batches[:done]))
    assert [len(groups) for groups in window.groups()] == taken(batches[:done], wanted)
    assert done <= accumulate * (1 + windows)
    assert found >= wanted or done == accumulate * (1 + windows)
    assert window.sums()["refill_exhausted"] == (found < wanted)
    window.clear()
    assert window.is_new and window.num_batches == accumulate


def taken(batches, wanted) -> list[int]:
    counts = []
    for batch in batches:
        counts.append(min(sum(batch), wanted))
        wanted -= counts[-1]
    return counts


def test_the_next_round_is_as_long_as_the_share_so_far_lets_expect():
    window = RefilledWindow(4, 10, 0, 1, list)
    window.add([[group(True), group(True)], *[[group(False)] * 2] * 3], 8)
    assert window.ask_for_more(False) and window.num_batches == 4 + 4, "2 of 8: 12 batches, at most 4 together"
    window.add([[group(True)] * 2] * 2 + [[group(False)] * 2] * 2, 8)
    assert window.ask_for_more(False) and window.num_batches == 8 + 3, "2 are missing, 6 of 16 are informative"


def test_without_a_budget_all_groups_are_kept_and_no_rank_asks_another():
    def ask(values):
        raise AssertionError("a collective operation")

    window = RefilledWindow(2, 0, 0, 2, ask)
    window.add([[group(False)], []], 2)
    assert not window.ask_for_more(False) and [len(groups) for groups in window.groups()] == [1, 0]
    assert window.sums() == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refill_windows": -1}, r"update\.refill_windows=-1 must be at least 0"),
        ({"refill_windows": 2, "skip_zero_advantage": False}, "only groups that are skipped can be replaced"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        UpdateSettings(**settings)


def test_replaced_groups_cannot_count_in_the_mean(build):
    with pytest.raises(ValueError, match=r"loss\.normalise_over='all' with update\.refill_windows=2"):
        build(refill_windows=2, normalise_over="all")


# In training


def test_an_update_has_its_number_of_informative_groups(build, pool, fit):
    """At least 95 % where skipping leaves at most 60 %, and the cost in samples is logged."""
    skipping, refilling, trained = Recorder(), Recorder(), Trained()
    fit(build(accumulate=2), pool, max_steps=5, callbacks=[skipping])
    assert "grpo/frac_informative" not in skipping.metrics[0]
    left = [1 - metrics["grpo/frac_zero_advantage"] for metrics in skipping.metrics]
    assert sum(left) / len(left) <= 0.6

    module = build(accumulate=2, refill_windows=5)
    trainer = fit(module, pool, max_steps=5, callbacks=[refilling, trained])
    assert trainer.global_step == 5 and all(len(prompts) == 4 for prompts in trained.prompts)
    assert all(number in HARD for prompts in trained.prompts for number in prompts)
    for metrics, batches in zip(refilling.metrics, trained.batches, strict=True):
        assert metrics["grpo/frac_informative"] >= 0.95 and metrics["grpo/refill_exhausted"] == 0
        assert metrics["grpo/prompts_per_group"] == 2 * batches / 4 > 1
        assert metrics["grpo/frac_zero_advantage"] >= 0.4, "over all sampled prompts"
    assert len(refilling.records) == 2 * sum(trained.batches) == 2 * module.num_batches


def test_the_update_is_that_of_a_window_of_the_informative_prompts_alone(build, pool, fit):
    refilled, plain = Recorder(), Recorder()
    settings = {"accumulate": 2, "kl_beta": 0.05}
    fit(build(refill_windows=3, **settings), pool, num_items=1, max_steps=1, callbacks=[refilled])
    hard = [pool[number] for number in (1, 4)]
    fit(build(**settings), hard, num_items=1, max_steps=1, callbacks=[plain])
    assert len(refilled.records) == 6 and len(plain.records) == 2
    for got, want in zip(refilled.gradients[0], plain.gradients[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)


def test_a_window_with_several_updates_is_refilled_too(build, pool, fit):
    module, trained = build(accumulate=2, refill_windows=5, epochs_per_rollout=2, minibatches=2), Trained()
    assert fit(module, pool, max_steps=8, callbacks=[trained]).global_step == 8
    assert [len(prompts) for prompts in trained.prompts] == [4, 4]


@pytest.mark.parametrize("stopped_after", [1, 3, 5, 8])
def test_resume_equals_a_run_left_alone(build, pool, fit, tmp_path, stopped_after):
    """Nothing is lost or repeated, also where the checkpoint falls between the rounds of a window."""

    class Killed(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx + 1 == stopped_after:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    settings = {"accumulate": 2, "refill_windows": 5}
    whole, resumed = Recorder(), Recorder()
    module, again = build(**settings), build(**settings)
    fit(module, pool, max_steps=4, callbacks=[whole])
    fit(build(**settings), pool, max_steps=4, callbacks=[Killed()])
    trainer = fit(again, pool, max_steps=4, callbacks=[resumed], ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == 4 and again.num_batches == module.num_batches
    assert resumed.records == whole.records[-len(resumed.records) :] and resumed.records
    assert all(
        torch.equal(ours, trained_weights(again.policy)[name]) for name, ours in trained_weights(module.policy).items()
    )


def test_no_completion_is_drawn_twice_though_prompts_come_again(build, pool, fit):
    """One policy, two hard prompts: a window samples each several times, and draws other completions each time."""
    module, recorder = build(accumulate=4, refill_windows=4, learning_rate=1e-12), Recorder()
    fit(module, pool[:2] + pool[2:4], num_items=2, max_steps=2, callbacks=[recorder])
    texts = defaultdict(list)
    for record in recorder.records:
        texts[record["id"]].append(tuple(record["texts"]))
    assert all(len(drawn) > 4 and len(set(drawn)) == len(drawn) for drawn in texts.values())


def test_a_budget_that_is_spent_trains_on_what_was_found(build, pool, fit):
    module, recorder, trained = build(accumulate=2, refill_windows=1), Recorder(), Trained()
    fit(module, pool[:5], num_items=1, max_steps=1, callbacks=[recorder, trained])  # prompts 0 to 3, of which 1 is hard
    assert trained.prompts == [[1]] and trained.batches == [4]
    assert recorder.metrics[0]["grpo/frac_informative"] == 0.5 and recorder.metrics[0]["grpo/refill_exhausted"] == 1


def test_a_run_in_which_nothing_teaches_ends_after_its_budget_with_the_reason(build, pool, fit):
    module = build(accumulate=2, refill_windows=2, max_idle_windows=3)
    easy = [item for item in pool if number_of(item) not in HARD]
    with pytest.raises(IdleTooLong, match="every completion is right") as caught:
        fit(module, easy, max_steps=50)
    assert module.num_batches == 3 * (2 + 2 * 2)
    assert "in each of 36 groups" in str(caught.value)


def test_the_last_window_takes_what_the_data_give_and_says_so(build, pool, fit, caplog):
    trained = Trained()
    trainer = fit(
        build(accumulate=2, refill_windows=5),
        pool,
        num_items=1,
        max_steps=5,
        max_epochs=1,
        limit_train_batches=11,
        callbacks=[trained],
    )
    assert trained.prompts == [[1, 4], [9]] and trained.batches == [6, 5] and trainer.global_step == 2
    assert "ended after 2 of 5 planned updates: groups that teach nothing were replaced" in caplog.text
    assert "trainer.max_epochs=1 are used up" in caplog.text


@pytest.mark.parametrize("max_epochs", [None, 1])
def test_a_run_that_is_stopped_before_does_not_say_that_its_data_are_used_up(build, pool, fit, caplog, max_epochs):
    class Stop(Callback):  # as the timer of trainer.max_time does
        def on_train_batch_end(self, trainer, module, *_):
            trainer.should_stop = trainer.global_step == 1

    limits = {"max_steps": 5} if max_epochs is None else {"max_epochs": 1, "limit_train_batches": 11}
    module = build(accumulate=2, refill_windows=5)
    assert fit(module, pool, num_items=1, callbacks=[Stop()], **limits).global_step == 1
    assert "planned updates: the Trainer was stopped, by trainer.max_time or a callback" in caplog.text
    assert "used up" not in caplog.text


def test_ranks_refill_together(build, pool, fit):
    """Both take the same batches and end with the same weights. What is too much is dropped, here on rank 1."""
    items = [pool[number] for number in (1, 4, 5, 0, 9, 1)]  # rank 0: 1, 5, 9; rank 1: 4, 0, 1

    def work():
        torch.set_num_threads(1)
        module, trained = build(accumulate=2, refill_windows=2), Trained()
        ranks = {"strategy": "ddp", "devices": 2}
        trainer = fit(module, items, num_items=1, max_steps=2, callbacks=[trained], **ranks)
        weights = {name: value.numpy() for name, value in trained_weights(module.policy).items()}
        return trained.prompts, trained.batches, trainer.global_step, weights

    first, second = run_ranks(2, work)
    assert first[0] == [[1, 5, 9]] * 2 and second[0] == [[4]] * 2
    assert first[1] == second[1] == [3, 3] and first[2] == second[2] == 2
    assert all((first[3][name] == second[3][name]).all() for name in first[3])


def test_a_window_is_refilled_from_servers(stub, tiny_model_dir, lora, pool, fit):
    trained = Trained()
    module = served(tiny_model_dir, lora, stub.url, accumulate=2, refill_windows=5)
    fit(module, pool, max_steps=3, callbacks=[trained])
    assert [len(prompts) for prompts in trained.prompts] == [4, 4, 4]
    assert len(stub.loads) == 4, "an adapter at the start and after each update, none between two rounds"
