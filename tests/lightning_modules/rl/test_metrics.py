"""The sums of a GRPO step: one state, one all-reduce, and uneven ranks that equal one process."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import distributed

from lightning_modules.rl.losses import LossTerms
from lightning_modules.rl.metrics import MEANS, GRPOMetrics
from lightning_modules.rl.rewards.reward_list import Reward
from lightning_modules.rollouts.base import Rollout
from tests.documented_metrics import documented_names
from tests.lightning_modules.ranks import run_ranks


def rollout(number: int) -> Rollout:
    ids = torch.arange(1 + number % 3)
    return Rollout(ids, -0.1 * (1 + ids.float()), finished=number % 2 == 0, text="")


def add_prompts(metrics: GRPOMetrics, numbers: range) -> None:
    """A group of two for each number, each with the loss of its packed row."""
    for number in numbers:
        accuracy = number / 10
        is_right = accuracy > 0.5
        rewards = [
            Reward(accuracy + k, {"accuracy": accuracy, "format": float(k)}, None, accuracy, is_right=is_right)
            for k in range(2)
        ]
        zero = torch.tensor([number % 3 == 0])
        metrics.add_rollouts([[rollout(number), rollout(number + 1)]], [rewards], zero)
        metrics.update(informative=number % 3 > 0)
        metrics.add_loss(LossTerms(torch.tensor(0.3 * number), 2.0, 5, 0.01 * number, number % 2))
        theirs = torch.tensor([-1.0, -2.0])
        metrics.add_sampler(theirs + torch.tensor([0.2, 1.0]), theirs, torch.tensor([False, True]))


def test_uneven_ranks_equal_one_process_with_one_collective():
    """Five groups on one rank, two on the other."""
    one = GRPOMetrics()
    add_prompts(one, range(7))
    expected = one.compute()

    def work():
        torch.set_num_threads(1)
        distributed.init_process_group("gloo")
        calls = dict.fromkeys(("all_reduce", "all_gather", "barrier", "all_gather_into_tensor"), 0)
        for name in calls:
            original = getattr(distributed, name)

            def counted(*args, original=original, name=name, **more):
                calls[name] += 1
                return original(*args, **more)

            setattr(distributed, name, counted)
        metrics = GRPOMetrics()
        add_prompts(metrics, range(5) if distributed.get_rank() == 0 else range(5, 7))
        sums, once = metrics.compute(), dict(calls)
        own = metrics.sums.tolist()  # a rank's state is its own again
        metrics.reset()
        add_prompts(metrics, range(1))
        return sums, once, own, metrics.compute()["groups"]

    first, second = run_ranks(2, work)
    for sums, calls, own, groups in (first, second):
        assert sums == pytest.approx(expected, rel=1e-12)
        assert calls == {"all_reduce": 1, "all_gather": 0, "barrier": 0, "all_gather_into_tensor": 0}
        assert own[0] in (5, 2) and groups == 2
    assert first[0] == second[0], "to the last digit"


def test_the_means_are_those_of_the_names_and_of_nothing_there_is_none():
    metrics = GRPOMetrics()
    add_prompts(metrics, range(4))
    sums = metrics.compute()
    means = metrics.means(sums)
    off = {"grpo/frac_masked", "grpo/token_entropy", "grpo/sequence_clip_fraction", "grpo/kl_penalty"}
    off |= {"grpo/frac_informative", "grpo/prompts_per_group", "grpo/refill_exhausted", "grpo/staleness"}
    assert means.keys() == MEANS.keys() - off | {"reward/accuracy", "reward/format"}
    assert means["reward/total"] == pytest.approx(0.15 + 0.5)
    assert means["reward/accuracy"] == pytest.approx(0.15) and means["reward/format"] == 0.5
    assert means["grpo/frac_zero_advantage"] == 0.5 and means["grpo/frac_truncated"] == 0.5
    assert means["grpo/loss"] == pytest.approx(1.8 / 8) and means["grpo/clip_fraction"] == pytest.approx(2 / 20)
    assert means["grpo/frac_capped"] == 0.5 and means["grpo/sampler_abs_log_ratio"] == pytest.approx(0.6)
    assert (sums["zero_iou"], sums["right"], sums["informative"]) == (2, 0, 2)
    metrics.reset()
    metrics.update(groups=1)
    assert metrics.means(metrics.compute()) == {"grpo/frac_zero_advantage": 0.0}


def test_every_metric_of_a_step_is_defined():
    assert MEANS.keys() | {"grpo/kl_beta", "grpo/entropy_coefficient"} <= documented_names()


def test_each_reward_has_its_spread_and_failures_are_counted():
    metrics = GRPOMetrics(("short", "judge"))
    values = [[0.0, 1.0, 0.5, None], [1.0, 0.0]]
    groups = []
    for group in values:
        left_out = None in group
        failed = [("judge",) if value is None else () for value in group]
        groups.append(
            [
                Reward(
                    0.0 if left_out else value, {"short": 0.25, "judge": value}, None, failed=names, left_out=left_out
                )
                for value, names in zip(group, failed, strict=True)
            ]
        )
    rollouts = [[rollout(0)] * len(group) for group in values]
    metrics.add_rollouts(rollouts, groups, torch.tensor([True, False]))
    sums = metrics.compute()
    means, spreads = metrics.means(sums), metrics.spreads(sums)
    assert means["reward/total"] == 0.5, "the mean of the second group: the first is left out"
    given = [value for group in values for value in group if value is not None]
    assert means["reward/judge"] == pytest.approx(statistics.mean(given)) and means["reward/short"] == 0.25
    assert spreads == pytest.approx(
        {
            "reward/short/std": 0.0,
            "reward/short/zero": 0.0,
            "reward/judge/std": statistics.pstdev(given),
            "reward/judge/zero": 2 / 5,
            "reward/judge/failed": 1 / 6,
        }
    )
    assert sums["failed"] == 1
    resumed = GRPOMetrics(("short", "judge"))
    resumed.add_rollouts([[rollout(0)]], [[Reward(0.5, {"short": 0.5, "judge": 0.0}, None)]], torch.tensor([True]))
    later = resumed.spreads(resumed.compute(), logged=spreads)
    assert later["reward/judge/failed"] == 0.0, "logged, so that no old share stays, in a resumed run neither"
    assert "reward/judge/failed" not in resumed.spreads(resumed.compute())


def test_a_sum_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"GRPOMetrics has no sums \['lenght'\]"):
        GRPOMetrics().update(lenght=1.0)


def test_the_state_is_in_no_checkpoint_and_keeps_its_precision():
    metrics = GRPOMetrics()
    assert metrics.state_dict() == {}
    assert metrics.float().sums.dtype == metrics.half().sums.dtype == torch.float64
