"""Eq. 1 against plain-Python loops."""

import math

import pytest
import torch

from lightning_modules.rl.advantages import group_advantages, has_equal_rewards


def reference_advantages(rewards):
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-4) for r in rewards]


def test_advantages_match_a_slow_reference():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([reference_advantages(row) for row in rewards.tolist()])
    torch.testing.assert_close(group_advantages(rewards), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.6, 1.5, 1 / 3])
def test_constant_group_is_equal_whatever_its_reward(value):
    """FIELD 8: a filter on the group's mean keeps a constant 0.6 group; rounding must not leave an advantage either."""
    rewards = torch.tensor([[value] * 8, [0.0, 1.0] * 4])
    assert has_equal_rewards(rewards).tolist() == [True, False]
    advantages = group_advantages(rewards)
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).all()


@pytest.mark.parametrize("rewards", [[[0.5], [1.0]], [0.5, 1.0], [[0.5, float("nan")]]])
def test_groups_without_a_standard_deviation_are_an_error(rewards):
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantages(torch.tensor(rewards))


def test_without_the_deviation_a_group_weighs_by_its_differences():
    rewards = torch.tensor([[0.0, 0.2, 0.1, 0.1], [0.0, 1.0, 0.5, 0.5], [0.6] * 4])
    found = group_advantages(rewards, scale="none")
    torch.testing.assert_close(found[:2], torch.tensor([[-0.1, 0.1, 0.0, 0.0], [-0.5, 0.5, 0.0, 0.0]]))
    assert (found[2] == 0).all()
    scaled = group_advantages(rewards)
    torch.testing.assert_close(scaled[0], scaled[1], atol=2e-3, rtol=1e-3)
