from __future__ import annotations

import pytest
import torch

from lightning_modules.rollouts.native.sampling import sample


def test_samples_follow_the_tempered_distribution() -> None:
    """Pearson's chi-square over 7 tokens, 20,000 draws; the 0.999 quantile at 6 degrees of freedom is 22.46."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0, 1.1, -0.4, 0.9])
    banned = torch.tensor([4])
    draws = 20_000
    uniform = torch.rand(draws, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits.expand(draws, -1), banned, 0.6, uniform)
    weights = torch.exp(logits.double() / 0.6)
    weights[4] = 0
    expected = weights / weights.sum()
    counts = torch.bincount(tokens, minlength=8).double()
    assert counts[4] == 0
    keep = expected > 0
    assert ((counts - draws * expected)[keep] ** 2 / (draws * expected[keep])).sum() < 22.46
    torch.testing.assert_close(log_probs.double(), expected.log()[tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [20_000, 16_384])
def test_tokens_of_a_large_vocabulary_are_those_of_one_long_sum(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, size, generator=generator)
    logits[0] = -1000.0
    logits[0, 700] = 0.0  # the only one with any width
    banned = torch.arange(0, size, 3)
    draws = torch.rand(64, 1, dtype=torch.float64, generator=generator)
    draws[1], draws[2] = 0.0, 1 - 2**-53
    tokens, log_probs = sample(logits, banned, 0.9, draws)
    expected = (logits / 0.9).index_fill(-1, banned, float("-inf")).log_softmax(-1)
    widths = expected.double().exp()
    ends = widths.cumsum(-1) / widths.sum(-1, keepdim=True)
    end, width = ends.gather(1, tokens[:, None]), widths.gather(1, tokens[:, None])
    assert (width > 0).all()
    assert ((end - width - 1e-6 <= draws) & (draws <= end + 1e-6)).all()  # sums in another order round differently
    assert tokens[:2].tolist() == [700, 1]
    torch.testing.assert_close(log_probs, expected.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [100, 10_000])
def test_logits_that_are_not_numbers_give_a_token_of_any_vocabulary(size: int) -> None:
    logits = torch.full((2, size), float("nan"))
    tokens, log_probs = sample(logits, torch.tensor([0]), 1.0, torch.rand(2, 1, dtype=torch.float64))
    assert tokens.max() < size and log_probs.isnan().all()
