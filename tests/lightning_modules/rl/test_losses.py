"""Eq. 2 and its variants against plain-Python loops and autograd on the written-out equation."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.rl.loss_settings import REDUCTIONS, LossSettings
from lightning_modules.rl.losses import LossInputs, clipped_surrogate, kl_estimate, policy_loss
from lightning_modules.rl.sampler_correction import sampler_correction

LENGTHS = [3, 1, 5, 2]
MAX_TOKENS = 6


@pytest.fixture
def tensors():
    """Four completions with old and reference log-probabilities far enough away that some tokens are clipped."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda scale: scale * torch.randn(sum(LENGTHS), generator=generator)  # noqa: E731
    log_probs = -draw(1.0).abs() - 0.05
    return SimpleNamespace(
        log_probs=log_probs.requires_grad_(),
        old=(log_probs + draw(0.3)).detach(),
        reference=(log_probs + draw(0.5)).detach(),
        completion=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        advantages=torch.tensor([1.2, -0.7, -0.9, 0.4]),
    )


def loss_of(t, mask=slice(None), clip=(0.2, 0.2), **changes):
    """`policy_loss` of the tokens that `mask` chooses; `changes` are fields of LossSettings and LossInputs."""
    inputs = {
        "log_probs": t.log_probs[mask],
        "completion_index": t.completion[mask],
        "advantages": t.advantages,
        "max_new_tokens": MAX_TOKENS,
        "old_log_probs": t.old[mask],
        "ref_log_probs": t.reference[mask],
    }
    settings = {"kl_beta": 0.0, "clip_low": clip[0], "clip_high": clip[1]}
    inputs |= {name: value for name, value in changes.items() if name in LossInputs.__dataclass_fields__}
    settings |= {name: value for name, value in changes.items() if name in LossSettings.__dataclass_fields__}
    return policy_loss(LossInputs(**inputs), LossSettings(**settings))


def reference_loss(t, beta, clip, reduction, log_probs=None, old=None):
    """Minus eq. 2, one token at a time. `log_probs` may hold scalars with gradient."""
    log_probs = list(t.log_probs) if log_probs is None else log_probs
    old = list(t.old) if old is None else old
    by_completion = defaultdict(list)
    for n, c in enumerate(t.completion.tolist()):
        ratio = torch.exp(log_probs[n] - old[n])
        value = ratio * t.advantages[c]
        if clip != (None, None):
            low, high = (0 if clip[0] is None else 1 - clip[0]), (math.inf if clip[1] is None else 1 + clip[1])
            held = min(max(ratio.item(), low), high)
            if held * t.advantages[c] < value:
                value = torch.as_tensor(held) * t.advantages[c]
        difference = t.reference[n] - log_probs[n]
        by_completion[c].append(-(value - beta * (torch.exp(difference) - difference - 1)))
    sums = [sum(values) for values in by_completion.values()]
    if reduction == "completion":
        return sum(s / len(v) for s, v in zip(sums, by_completion.values(), strict=True)) / len(sums)
    return sum(sums) / normaliser(t, reduction, len(sums))


def normaliser(t, reduction, num_completions):
    """What a sum over all tokens is divided by."""
    of = {"token": len(t.completion), "dr_grpo": num_completions * MAX_TOKENS, "completion_sum": num_completions}
    return of[reduction]


def test_k3_is_zero_at_equality_and_never_negative(tensors):
    assert kl_estimate(tensors.old, tensors.old, "k3").abs().max() == 0
    assert (kl_estimate(tensors.log_probs, tensors.reference, "k3") >= 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("clip", [(None, None), (0.2, 0.2), (0.1, 0.3), (None, 0.2), (0.2, None)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient_match_the_written_out_equation(tensors, beta, clip, reduction):
    terms = loss_of(tensors, clip=clip, kl_beta=beta, reduction=reduction)
    leaves = [p.detach().clone().requires_grad_() for p in tensors.log_probs]
    expected = reference_loss(tensors, beta, clip, reduction, leaves)
    torch.testing.assert_close(terms.loss, expected, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(terms.loss, tensors.log_probs)
    expected_gradient = torch.autograd.grad(expected, leaves, allow_unused=True)
    expected_gradient = [torch.zeros(()) if g is None else g for g in expected_gradient]
    torch.testing.assert_close(gradient, torch.stack(expected_gradient), atol=1e-6, rtol=1e-5)


def test_clip_is_active_in_the_data_above_and_is_counted(tensors):
    ratio = torch.exp(tensors.log_probs - tensors.old).tolist()
    advantage = tensors.advantages[tensors.completion].tolist()
    held = sum((r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in zip(ratio, advantage, strict=True))
    assert held >= 2
    assert loss_of(tensors).num_clipped == held


def test_without_old_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(tensors):
    terms = loss_of(tensors, old_log_probs=None)
    lengths = torch.tensor(LENGTHS, dtype=torch.float)[tensors.completion]
    expected = -tensors.advantages[tensors.completion] / lengths / len(LENGTHS)
    (gradient,) = torch.autograd.grad(terms.loss, tensors.log_probs)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(terms.loss.detach(), -tensors.advantages.mean())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_terms_of_parts_add_up_to_the_whole(tensors, reduction):
    def part(mask):
        return loss_of(tensors, mask, kl_beta=0.01, reduction=reduction)

    first = tensors.completion < 1
    parts, whole = [part(first), part(~first)], part(torch.ones_like(first))
    combined = sum(p.total for p in parts) / sum(p.count for p in parts)
    torch.testing.assert_close(combined, whole.loss)
    assert sum(p.num_tokens for p in parts) == whole.num_tokens


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_absent_completions_are_not_in_the_normaliser(tensors, reduction):
    """Tokens of a group without advantage are left out; its advantages may stay in the list."""
    without = loss_of(tensors, reduction=reduction)
    padded = loss_of(tensors, advantages=torch.cat([tensors.advantages, torch.zeros(4)]), reduction=reduction)
    assert padded.count == without.count
    torch.testing.assert_close(padded.loss, without.loss)


def test_settings_that_cannot_work_are_errors(tensors):
    with pytest.raises(ValueError, match=r"kl_beta=0\.1 needs log-probabilities of the reference"):
        loss_of(tensors, kl_beta=0.1, ref_log_probs=None)
    bad = {"kl_beta": -0.1, "clip_low": 1.0, "clip_high": 0, "reduction": "mean"}
    with pytest.raises(ValueError) as caught:
        LossSettings(**bad)
    for name, value in bad.items():
        assert f"loss.{name}={value!r}" in str(caught.value)


def test_importance_weights_match_a_written_out_reference():
    own = torch.tensor([-0.5, -2.0, -1.0, -3.0], requires_grad=True)
    engine = torch.tensor([-0.5, -1.0, -2.0, -1.0])
    weights, held = sampler_correction(own, engine, torch.tensor([0, 0, 1, 1]), "token_truncate", 2.0)
    expected = [min(math.exp(a - b), 2.0) for a, b in zip(own.tolist(), engine.tolist(), strict=True)]
    assert weights.tolist() == pytest.approx(expected) and expected[2] == 2.0 and expected[1] < 1
    assert not weights.requires_grad and held.tolist() == [False, False, True, False]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_importance_weighs_the_surrogate_of_each_token_and_not_its_kl(tensors, reduction):
    t, beta, clip_range = tensors, 0.1, 0.2
    engine = t.old + 0.4 * torch.randn(len(t.old), generator=torch.Generator().manual_seed(1))
    weights = [min(math.exp(a - b), 1.1) for a, b in zip(t.old.tolist(), engine.tolist(), strict=True)]
    assert 0 < sum(weight == 1.1 for weight in weights) < len(weights)
    by_completion = defaultdict(list)
    for n, c in enumerate(t.completion.tolist()):
        ratio = torch.exp(t.log_probs[n] - t.old[n])
        held = ratio.clamp(1 - clip_range, 1 + clip_range)
        surrogate = weights[n] * torch.minimum(ratio * t.advantages[c], held * t.advantages[c])
        difference = t.reference[n] - t.log_probs[n]
        by_completion[c].append(-(surrogate - beta * (torch.exp(difference) - difference - 1)))
    sums = [sum(values) for values in by_completion.values()]
    if reduction == "completion":
        expected = sum(s / len(v) for s, v in zip(sums, by_completion.values(), strict=True)) / len(sums)
    else:
        expected = sum(sums) / normaliser(t, reduction, len(sums))
    importance, _ = sampler_correction(t.old, engine, t.completion, "token_truncate", 1.1)
    got = loss_of(t, kl_beta=beta, reduction=reduction, sampler_weights=importance).loss
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, t.log_probs, retain_graph=True)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_every_kl_term_matches_a_written_out_reference(tensors, estimator, unbiased):
    leaves = [p.detach().clone().requires_grad_() for p in tensors.log_probs]
    by_completion = defaultdict(list)
    for n, c in enumerate(tensors.completion.tolist()):
        ratio = torch.exp(leaves[n] - tensors.old[n])
        d = tensors.reference[n] - leaves[n]
        kl = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[estimator] * (ratio if unbiased else 1.0)
        by_completion[c].append(0.1 * kl - ratio * tensors.advantages[c])
    expected = sum(sum(values) / len(values) for values in by_completion.values()) / len(LENGTHS)
    terms = loss_of(tensors, clip=(None, None), kl_beta=0.1, kl_estimator=estimator, kl_unbiased=unbiased)
    torch.testing.assert_close(terms.loss, expected)
    (gradient,) = torch.autograd.grad(terms.loss, tensors.log_probs)
    torch.testing.assert_close(gradient, torch.stack(torch.autograd.grad(expected, leaves)))


def test_the_gradients_of_the_kl_terms_in_the_mean():
    """Over all tokens of a small vocabulary: what docs/rl.md says of each estimator."""
    generator = torch.Generator().manual_seed(2)
    logits, others = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    reference = others.log_softmax(0)

    def mean_gradient(estimator: str, unbiased: bool) -> torch.Tensor:
        log_probs = logits.log_softmax(0)
        ratio = torch.exp(log_probs - log_probs.detach()) if unbiased else 1.0
        loss = (log_probs.detach().exp() * ratio * kl_estimate(log_probs, reference, estimator)).sum()
        return torch.autograd.grad(loss, logits)[0]

    def gradient_of(divergence) -> torch.Tensor:
        return torch.autograd.grad(divergence, logits)[0]

    log_probs = logits.log_softmax(0)
    of_policy = gradient_of((log_probs.exp() * (log_probs - reference)).sum())  # KL(policy | reference)
    of_reference = gradient_of((reference.exp() * (reference - logits.log_softmax(0))).sum())
    assert mean_gradient("k1", False).abs().max() < 1e-12
    torch.testing.assert_close(mean_gradient("k2", False), of_policy)
    torch.testing.assert_close(mean_gradient("k3", False), of_reference)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(mean_gradient(estimator, True), of_policy)
    assert (of_policy - of_reference).abs().max() > 0.01


OTHERS = {
    "GSPO": {"ratio": "sequence"},
    "CISPO": {"objective": "cispo"},
    "SAPO": {"objective": "sapo", "clip": (None, None)},
    "dual clip": {"dual_clip": 3.0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_with_one_update_to_a_window_every_objective_has_the_gradient_of_grpo(tensors, name):
    """The ratio is 1 then. They differ once the policy has moved."""
    (expected,) = torch.autograd.grad(loss_of(tensors, old_log_probs=None).loss, tensors.log_probs)
    (found,) = torch.autograd.grad(loss_of(tensors, old_log_probs=None, **OTHERS[name]).loss, tensors.log_probs)
    torch.testing.assert_close(found, expected)
    moved = [torch.autograd.grad(loss_of(tensors, **more).loss, tensors.log_probs)[0] for more in ({}, OTHERS[name])]
    if name != "dual clip":
        assert (moved[0] - moved[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("clip", "surrogates"),
    [
        ((0.2, 0.2), [1.2, -3.0, -2.0, 0.1, -0.8]),
        ((0.2, None), [5.0, -3.0, -2.0, 0.1, -0.8]),
        ((None, None), [5.0, -3.0, -2.0, 0.1, -0.1]),
    ],
)
def test_dual_clip_bounds_negative_advantages_alone(clip, surrogates):
    """arXiv:1912.09729, eq. 5, with the bound 3; whatever the other two bounds are."""
    ratio = torch.tensor([5.0, 5.0, 2.0, 0.1, 0.1])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    found, is_clipped = clipped_surrogate(ratio, advantages, *clip, dual_clip=3.0)
    torch.testing.assert_close(found, torch.tensor(surrogates))
    assert is_clipped.tolist() == [a != b for a, b in zip(surrogates, [5.0, -5.0, -2.0, 0.1, -0.1], strict=True)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_entropy_bonus_is_reduced_as_the_loss_is(tensors, reduction):
    entropies = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain = loss_of(tensors, reduction=reduction)
    terms = loss_of(tensors, reduction=reduction, entropies=entropies, entropy_coefficient=0.3)
    by_completion = [part.sum() for part in entropies.split(LENGTHS)]
    if reduction == "completion":
        mean = sum(total / n for total, n in zip(by_completion, LENGTHS, strict=True)) / len(LENGTHS)
    else:
        mean = sum(by_completion) / normaliser(tensors, reduction, len(LENGTHS))
    torch.testing.assert_close(terms.loss, plain.loss - 0.3 * mean)
    assert terms.entropy_sum == pytest.approx(entropies.sum().item()) and plain.entropy_sum is None


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_parts_of_a_ratio_by_sequence_add_up_too(tensors, ratio):
    parts = [
        loss_of(tensors, mask, ratio=ratio, clip=(0.05, 0.05))
        for mask in (tensors.completion < 2, tensors.completion >= 2)
    ]
    whole = loss_of(tensors, ratio=ratio, clip=(0.05, 0.05))
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    assert sum(p.num_clipped_completions for p in parts) == whole.num_clipped_completions
    assert whole.num_completions == (len(LENGTHS) if ratio == "sequence" else 0)
    assert (0 < whole.num_clipped_completions < len(LENGTHS)) == (ratio == "sequence")
