"""Loss and gradient of every objective that TRL has equal those of TRL's own `GRPOTrainer._compute_loss`, to 1e-6.

TRL's function runs as it is; its model call is replaced by given log-probabilities and entropies. Everything is in
float64. `pytest -s` prints the table of differences.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.rl.loss_settings import EntropySettings, LossSettings
from lightning_modules.rl.losses import LossInputs, policy_loss
from lightning_modules.rl.rollout_batch import PromptGroup, absent_count
from lightning_modules.rl.sampler_correction import sampler_correction

LENGTHS = [3, 1, 5, 2, 6, 4]
MAX_TOKENS = 7
TOLERANCE = 1e-6
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
# name -> (TRL's settings, ours)
OBJECTIVES = {
    "GRPO": ({"loss_type": "grpo"}, {"reduction": "completion"}),
    "BNPO": ({"loss_type": "bnpo"}, {"reduction": "token"}),
    "DAPO": ({"loss_type": "dapo"}, {"reduction": "token"}),
    "Dr. GRPO": ({"loss_type": "dr_grpo"}, {"reduction": "dr_grpo"}),
    "GRPO, dual clip": ({"loss_type": "grpo", "delta": 1.5}, {"dual_clip": 1.5}),
    "GSPO": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"ratio": "sequence"}),
    "LUSPO": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"ratio": "sequence", "reduction": "completion_sum"},
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 1.28},  # TRL's is the bound itself, ours its distance from 1
        {"objective": "cispo", "reduction": "token", "clip_low": None},
    ),
    "SAPO": ({"loss_type": "sapo"}, {"objective": "sapo", "clip_low": None, "clip_high": None}),
}
KL = {
    "": (0.0, {}),
    "k3": (0.04, {}),
    "k3 · ratio": (0.04, {"kl_unbiased": True}),
}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture
def trl():
    return pytest.importorskip("trl", exc_type=ImportError)


def make_tensors(seed: int = 5) -> SimpleNamespace:
    """Six completions; old, reference and engine are far enough away for every bound to be met by some tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda scale: scale * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)  # noqa: E731
    log_probs = -draw(1.0).abs() - 0.05
    return SimpleNamespace(
        log_probs=log_probs.requires_grad_(),
        old=(log_probs + draw(0.4)).detach(),
        reference=(log_probs + draw(0.5)).detach(),
        engine=(log_probs + draw(0.4)).detach(),
        entropies=draw(1.0).abs().requires_grad_(),
        index=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        advantages=torch.tensor([1.2, -0.7, -0.9, 0.4, 1.1, -1.3], dtype=torch.float64),
    )


def pad(values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """[N] laid end to end -> [C, longest], as TRL holds them."""
    return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True, padding_value=fill)


def trl_loss(trl, t, beta=0.0, old=None, weights=None, kl_unbiased=False, entropy_coef=0.0, mask=None, **settings):
    """TRL's loss of these tensors, and the metrics that it logs."""
    mask = pad(torch.ones_like(t.log_probs)).detach() if mask is None else mask
    log_probs, entropies = pad(t.log_probs), pad(t.entropies)
    given = {"delta": None, "importance_sampling_level": "token", "epsilon_high": CLIP["clip_high"]} | settings
    arguments = SimpleNamespace(
        use_bias_correction_kl=kl_unbiased,
        delta=given["delta"],
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=given["importance_sampling_level"],
        beta=beta,
        loss_type=given["loss_type"],
        epsilon_low=CLIP["clip_low"],
        epsilon_high=given["epsilon_high"],
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        model=torch.nn.Linear(1, 1),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        args=arguments,
    )
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask,
        "advantages": t.advantages,
        "ref_per_token_logps": pad(t.reference),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    if old is not None:
        inputs["old_per_token_logps"] = pad(old)
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def our_terms(t, keep=slice(None), old=None, weights=None, entropies=None, **settings):
    """`policy_loss` of the tokens that `keep` chooses."""
    inputs = LossInputs(
        t.log_probs[keep],
        t.index[keep],
        t.advantages,
        MAX_TOKENS,
        None if old is None else old[keep],
        t.reference[keep],
        None if weights is None else weights[keep],
        None if entropies is None else entropies[keep],
    )
    return policy_loss(inputs, LossSettings(**{"kl_beta": 0.0} | CLIP | settings))


def differences(ours, theirs, *leaves) -> tuple[float, float]:
    """Greatest difference of the losses, and of the gradients by `leaves`."""
    both = [torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in (ours, theirs)]
    zero = torch.zeros(())
    pairs = [(zero if a is None else a, zero if b is None else b) for a, b in zip(*both, strict=True)]
    assert any((b != 0).any() for _, b in pairs)
    return abs(ours.item() - theirs.item()), max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.filterwarnings("default")  # TRL's own warnings are not ours
def test_every_objective_equals_trls(trl) -> None:
    t, rows = make_tensors(), []
    for name, (theirs, own) in OBJECTIVES.items():
        for kl, (beta, unbiased) in KL.items():
            if unbiased and own.get("ratio") == "sequence":
                continue  # TRL multiplies a token's KL by its sequence's ratio: not the gradient of the true KL
            for policy, old in (("moved", t.old), ("as sampled", None)):
                expected, metrics = trl_loss(trl, t, beta=beta, old=old, **theirs, **unbiased)
                terms = our_terms(t, old=old, kl_beta=beta, **own, **unbiased)
                rows.append((name, policy, kl, *differences(terms.loss, expected, t.log_probs)))
                if beta:
                    assert terms.kl_sum / terms.num_tokens == pytest.approx(metrics["kl"][0], rel=1e-9)
                if own.get("ratio") == "sequence":
                    share = terms.num_clipped_completions / terms.num_completions
                    assert share == pytest.approx(metrics["clip_ratio/region_mean"][0])
                elif name in ("GRPO", "DAPO", "Dr. GRPO"):
                    assert terms.num_clipped / terms.num_tokens == pytest.approx(metrics["clip_ratio/region_mean"][0])
    print_table(rows)
    assert max(max(row[3:]) for row in rows) < TOLERANCE


def print_table(rows) -> None:
    print(f"\n{'objective':<16} {'policy':<11} {'KL':<11} {'|Δ loss|':>9} {'|Δ gradient|':>13}")
    for name, policy, kl, loss, gradient in rows:
        print(f"{name:<16} {policy:<11} {kl:<11} {loss:9.1e} {gradient:13.1e}")


def test_the_data_meet_every_bound() -> None:
    """Otherwise an objective could equal another one on them."""
    t = make_tensors()
    losses = {name: our_terms(t, old=t.old, **own).loss.item() for name, (_, own) in OBJECTIVES.items()}
    assert len({round(loss, 9) for loss in losses.values()}) == len(OBJECTIVES) - 1  # BNPO is DAPO on one batch
    ratio = torch.exp(t.log_probs - t.old)
    assert (ratio < 0.8).any() and (ratio > 1.28).any() and (ratio > 1.5).any()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("floor", [None, 0.8])
def test_the_correction_of_the_sampler_equals_trls(trl, mode, floor) -> None:
    """The weights are written out as TRL's trainer makes them from what vLLM states; its loss applies them."""
    t, cap = make_tensors(), 1.3
    difference = pad(t.old - t.engine)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    theirs = torch.exp(difference)
    if mode.endswith("truncate"):
        theirs = theirs.clamp(min=floor, max=cap)
    else:
        theirs = theirs.masked_fill((theirs > cap) | (theirs < (floor or 0)), 0.0)
    expected, _ = trl_loss(trl, t, old=t.old, weights=theirs, loss_type="dapo", beta=0.04)
    weights, is_beyond = sampler_correction(t.old, t.engine, t.index, mode, cap, floor)
    assert 0 < is_beyond.sum() < len(is_beyond)
    terms = our_terms(t, old=t.old, weights=weights, reduction="token", kl_beta=0.04)
    assert max(differences(terms.loss, expected, t.log_probs)) < TOLERANCE


@pytest.mark.filterwarnings("default")
def test_the_entropy_bonus_equals_trls(trl) -> None:
    """TRL's bonus is a mean over tokens; ours is reduced as the loss is, so they are equal where that is by token."""
    t = make_tensors()
    expected, _ = trl_loss(trl, t, old=t.old, loss_type="dapo", entropy_coef=0.03)
    settings = {"reduction": "token", "entropy": EntropySettings(coefficient=0.03)}
    terms = our_terms(t, old=t.old, entropies=t.entropies, **settings)
    assert max(differences(terms.loss, expected, t.log_probs, t.entropies)) < TOLERANCE
    assert terms.entropy_sum == pytest.approx(t.entropies.sum().item())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("masked", [(), (5,)])
@pytest.mark.parametrize(
    ("loss_type", "reduction"), [("grpo", "completion"), ("dapo", "token"), ("dr_grpo", "dr_grpo")]
)
def test_a_mean_over_all_equals_trls_where_groups_are_skipped(trl, loss_type, reduction, masked) -> None:
    """Completions 1 and 3 are of a group of equal rewards; a masked one was cut at the length limit."""
    t = make_tensors()
    t.advantages[[1, 3]] = 0.0
    mask = pad(torch.ones_like(t.log_probs)).detach()
    mask[list(masked)] = 0.0
    expected, _ = trl_loss(trl, t, old=t.old, mask=mask, loss_type=loss_type)
    left_out = (1, 3, *masked)
    terms = our_terms(t, ~torch.isin(t.index, torch.tensor(left_out)), old=t.old, reduction=reduction)
    tokens = sum(LENGTHS[c] for c in (1, 3))
    group = PromptGroup(None, None, [], torch.zeros(0), [], None, len(left_out), tokens)
    loss = terms.total / (terms.count + absent_count([group], reduction))
    assert max(differences(loss, expected, t.log_probs)) < TOLERANCE
