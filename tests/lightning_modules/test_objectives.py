"""The objective's knobs in a training module: what reaches the gradient, and that a resumed run equals a whole one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.rl.advantages import group_advantages
from lightning_modules.rl.loss_settings import EntropySettings, ScheduleSettings
from tests.lightning_modules.conftest import trained_weights
from tests.lightning_modules.grpo_modules import Recorder, RecordingEngine, build_grpo, flat_reward, letters, use_reward

MAX_NEW = 8
SEVERAL = {"epochs_per_rollout": 2, "minibatches": 2, "accumulate": 2}


@pytest.fixture
def easy(monkeypatch):
    use_reward(monkeypatch, letters)


@pytest.fixture
def build(tiny_model_dir, lora):
    def make(**settings):
        small = {"lora": lora, "group_size": 4, "temperature": 1.0, "max_new_tokens": MAX_NEW, "learning_rate": 1e-3}
        module = build_grpo(str(tiny_model_dir), **small | settings)
        module.configure_model()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():  # away from the start, where policy and reference are the same model
            for parameter in module.policy.trainable_parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return module

    return make


def first_gradient(module, items, fit, **trainer):
    """The gradient of the first update, and what was recorded."""
    recorder = Recorder()
    module.max_grad_norm = None
    module.engine = RecordingEngine(module.engine)
    fit(module, items, callbacks=[recorder], **{"max_steps": 1} | trainer)
    return recorder.gradients[0], recorder


def alone(module, item, rollout, reference=False):
    """Log-probabilities [T] of one completion in a row of its own."""
    (rows,) = pack_rows([item], [[rollout.token_ids]], 100_000)
    features = module.policy.encode_images([item])
    return module.policy.token_log_probs(rows, features, 1.0, reference=reference)


@pytest.mark.parametrize("reduction", ["completion", "token", "dr_grpo"])
@pytest.mark.parametrize("several", [False, True])
def test_a_mean_over_all_divides_by_skipped_groups_too(build, make_items, fit, monkeypatch, reduction, several):
    """One group of four has equal rewards: the same gradient, times the share that is trained on."""
    items = make_items([1, 2, 1, 3])

    def constant_for_one(text, answer, image_sizes, *rest):
        return flat_reward(0.6) if image_sizes is items[2].image_sizes else letters(text, answer, image_sizes, *rest)

    use_reward(monkeypatch, constant_for_one)
    settings = {"kl_beta": 0.05, "accumulate": 2, "reduction": reduction, "epochs_per_rollout": 1 + several}
    kept, of_kept = first_gradient(build(**settings), items, fit)
    module = build(normalise_over="all", **settings)
    found, of_all = first_gradient(module, items, fit)
    lengths = [[len(r.token_ids) for r in group] for _, group in module.engine.seen[:4]]
    sizes = [sum(group) if reduction == "token" else len(group) for group in lengths]  # what each group counts
    for a, b in zip(found, kept, strict=True):
        torch.testing.assert_close(a, (1 - sizes[2] / sum(sizes)) * b)
    if not several:
        of_all, of_kept = (run.metrics[0]["grpo/loss"] for run in (of_all, of_kept))
        assert of_all == pytest.approx(of_kept * (1 - sizes[2] / sum(sizes)))


def test_the_first_of_several_updates_has_the_ratio_1_with_dropout_too(build, lora, make_items, fit, easy):
    """Old log-probabilities are those of the policy that sampled, which has no dropout."""
    given = SEVERAL | {"lora": replace(lora, dropout=0.5)}
    module = build(**given)
    log_probs = module.policy.token_log_probs
    seen = []

    def noted(rows, features, temperature, **more):
        modes = {m.training for m in module.policy.modules() if isinstance(m, torch.nn.Dropout)}
        seen.append((torch.is_grad_enabled(), modes))
        return log_probs(rows, features, temperature, **more)

    module.policy.token_log_probs = noted
    fit(module, make_items([1, 2, 1, 3]), max_steps=4)
    assert {mode for gradient, modes in seen if not gradient for mode in modes} == {False}
    assert {mode for gradient, modes in seen if gradient for mode in modes} == {True}


def test_groups_of_all_batches_of_a_window_share_packed_rows(build, make_items, fit, easy):
    """Four batches of one prompt: one pass with gradient where the row has room, the same gradient from small rows."""

    def run(**settings):
        module = build(kl_beta=0.05, accumulate=4, **settings)
        log_probs, passes = module.policy.token_log_probs, []

        def noted(rows, *more, **named):
            passes.append((len(rows.items), torch.is_grad_enabled() and not named.get("reference", False)))
            return log_probs(rows, *more, **named)

        module.policy.token_log_probs = noted
        gradient, _ = first_gradient(module, make_items([1, 2, 1, 3]), fit, num_items=1)
        return gradient, [items for items, with_gradient in passes if with_gradient]

    together, passes = run()
    apart, of_small_rows = run(max_tokens_per_row=10)
    assert passes == [4] and of_small_rows == [1] * 4
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_no_difference_between_sampler_and_trainer(build, lora, make_items, fit, easy):
    """The engine samples without dropout, so the sampler correction compares with log-probabilities without it."""
    recorder = Recorder()
    module = build(lora=replace(lora, dropout=0.5), importance_cap=1.5, kl_beta=0.0, accumulate=2)
    fit(module, make_items([1, 2, 1, 3]), max_steps=2, callbacks=[recorder])
    assert [m["grpo/sampler_abs_log_ratio"] < 1e-4 for m in recorder.metrics] == [True, True]
    assert [m["grpo/frac_capped"] for m in recorder.metrics] == [0.0, 0.0]


def test_a_mean_over_all_makes_no_update_of_nothing(build, make_items, fit, monkeypatch):
    """Groups that are only counted move no weight by decay or momentum."""
    use_reward(monkeypatch, lambda *_: flat_reward(0.6))

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    for several in ({}, SEVERAL | {"accumulate": 1}):
        module = build(normalise_over="all", weight_decay=0.5, **several)
        before = trained_weights(module.policy)
        assert fit(module, make_items([1, 2]), max_steps=4, callbacks=[Stop()]).global_step == 0
        assert all(torch.equal(before[name], value) for name, value in trained_weights(module.policy).items())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_kl_term_in_the_reward(build, make_items, fit, easy, estimator, scale):
    """Advantages are those of the rewards minus β · Σ KL, and the loss has no KL term."""
    settings = {"kl_in": "reward", "kl_beta": 0.3, "kl_estimator": estimator, "scale": scale}
    module = build(**settings)
    start = trained_weights(module.policy)
    found, recorder = first_gradient(module, make_items([1, 2]), fit)
    module.policy.load_state_dict(start, strict=False)
    losses, penalties = [], []
    for record, (item, group) in zip(recorder.records, module.engine.seen, strict=True):
        shaped = []
        for parts, rollout in zip(record["rewards"], group, strict=True):
            d = alone(module, item, rollout, reference=True) - alone(module, item, rollout).detach()
            kl = {"k1": -d, "k3": torch.exp(d) - d - 1}[estimator].sum().item()
            shaped.append(parts["total"] - 0.3 * kl)
            penalties.append(0.3 * kl)
        advantages = group_advantages(torch.tensor([shaped], dtype=torch.float64), scale)[0]
        assert record["advantages"] == pytest.approx(advantages.tolist(), abs=2e-3, rel=2e-3)
        losses += [
            -a * torch.exp(lp - lp.detach()).mean()
            for a, lp in ((a, alone(module, item, r)) for a, r in zip(advantages, group, strict=True))
        ]
    expected = torch.autograd.grad(sum(losses) / len(losses), module.policy.trainable_parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-2)
    assert recorder.metrics[0]["grpo/kl_penalty"] == pytest.approx(sum(penalties) / len(penalties), rel=1e-3)
    assert recorder.metrics[0]["grpo/kl"] == 0  # none in the loss


def test_groups_of_equal_rewards_are_not_trained_on_for_their_penalty(build, make_items, fit, monkeypatch):
    """Otherwise the division by a deviation of small penalties would make them as large as a reward."""
    use_reward(monkeypatch, lambda *_: flat_reward(0.6))

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    module = build(kl_in="reward", kl_beta=0.3)
    assert fit(module, make_items([1, 2]), max_steps=3, callbacks=[Stop()]).global_step == 0
    module = build(kl_in="reward", kl_beta=0.3, skip_zero_advantage=False)
    assert fit(module, make_items([1, 2]), max_steps=1).global_step == 1


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_group_without_rewards_is_never_trained_on(build, make_items, fit, monkeypatch, kl_in):
    """The reward failed for one of two prompts: the gradient is that of the other prompt alone."""
    kept, missing = items = make_items([1, 2])
    settings = {"kl_in": kl_in, "kl_beta": 0.3, "skip_zero_advantage": False}
    use_reward(monkeypatch, letters)
    expected, _ = first_gradient(build(**settings), [kept], fit, num_items=1)

    def failed_for_one(text, answer, image_sizes):
        found = letters(text, answer, image_sizes)
        return replace(found, total=0.0, left_out=True) if image_sizes is missing.image_sizes else found

    use_reward(monkeypatch, failed_for_one)
    found, recorder = first_gradient(build(**settings), items, fit)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-3)
    of_kept, of_missing = (record["advantages"] for record in recorder.records)
    assert any(of_kept) and not any(of_missing)


def test_the_entropy_bonus_reaches_the_gradient(build, make_items, fit, easy):
    module = build(kl_beta=0.0, entropy=EntropySettings(coefficient=0.2), max_tokens_per_row=10)
    start, items = trained_weights(module.policy), make_items([1, 2])
    found, recorder = first_gradient(module, items, fit)
    plain, _ = first_gradient(build(kl_beta=0.0), items, fit)
    module.policy.load_state_dict(start, strict=False)
    means = []
    for item, group in module.engine.seen:
        for rollout in group:
            (rows,) = pack_rows([item], [[rollout.token_ids]], 100_000)
            features = module.policy.encode_images([item])
            means.append(module.policy.token_log_probs(rows, features, 1.0, with_entropy=True)[1].mean())
    bonus = torch.autograd.grad(sum(means) / len(means), module.policy.trainable_parameters())
    for a, b, c in zip(found, plain, bonus, strict=True):
        torch.testing.assert_close(a, b - 0.2 * c, atol=2e-6, rtol=1e-2)
    metrics = recorder.metrics[0]
    assert metrics["grpo/token_entropy"] == pytest.approx(metrics["grpo/entropy"], rel=0.3)
    assert "grpo/entropy_coefficient" not in metrics  # it does not change


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_correction_of_the_sampler_is_logged_by_its_kind(build, make_items, fit, easy, mode):
    module = build(kl_beta=0.0, importance_cap=1.0 + 1e-7, importance_mode=mode)
    _, recorder = first_gradient(module, make_items([1, 2]), fit)
    metrics = recorder.metrics[0]
    assert ("grpo/frac_masked" in metrics) == mode.endswith("mask")
    assert 0 < metrics["grpo/frac_masked" if mode.endswith("mask") else "grpo/frac_capped"] < 1


STATEFUL = {
    "schedule": {"kl_beta": 0.2, "kl_schedule": ScheduleSettings("cosine", final=0.01, updates=6)},
    "schedule over the run": {"kl_beta": 0.0, "kl_schedule": ScheduleSettings("linear", final=0.2), "accumulate": 2},
    "controller": {"kl_beta": 0.0, "entropy": EntropySettings(0.1, target=100.0, step=0.1), "accumulate": 2},
    "refresh": {"kl_beta": 0.2, "reference_every": 2},
    "refresh of a copy": {"kl_beta": 0.2, "reference_every": 2, "lora": None, "learning_rate": 1e-4},
    "all, several updates": {
        "kl_beta": 0.2,
        "kl_schedule": ScheduleSettings("linear", final=0.1, updates=10),
        "entropy": EntropySettings(0.1, target=100.0, step=0.1),
        "reference_every": 3,
        "normalise_over": "all",
        "ratio": "sequence",
        **SEVERAL,
    },
}


@pytest.mark.parametrize("name", STATEFUL)
def test_resume_equals_a_run_left_alone(build, make_items, fit, easy, tmp_path, name):
    """Same texts, rewards, metrics and weights, though the checkpoint may fall inside a window."""
    settings, items = STATEFUL[name], make_items([1, 2, 1, 1, 2])
    accumulate, steps = settings.get("accumulate", 1), 12 if "several" in name else 6

    class Killed(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx + 1 == 3 * accumulate - (accumulate > 1):
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    whole, resumed = Recorder(), Recorder()
    module = build(**settings)
    fit(module, items, max_steps=steps, callbacks=[whole])
    fit(build(**settings), items, max_steps=steps, callbacks=[Killed()])
    again = build(**settings)
    trainer = fit(again, items, max_steps=steps, callbacks=[resumed], ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == steps
    assert resumed.records == whole.records[-len(resumed.records) :] and 0 < len(resumed.records) < len(whole.records)
    of_loss = [{k: v for k, v in m.items() if not k.startswith("speed/")} for m in whole.metrics]
    assert [{k: v for k, v in m.items() if not k.startswith("speed/")} for m in resumed.metrics] == of_loss[
        -len(resumed.metrics) :
    ]
    pairs = zip(module.policy.trainable_parameters(), again.policy.trainable_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_schedule_and_a_controller_move_and_are_logged(build, make_items, fit, easy):
    recorder = Recorder()
    entropy = EntropySettings(0.1, target=100.0, step=0.1)
    module = build(kl_beta=0.2, kl_schedule=ScheduleSettings("linear", 0.0, updates=3), entropy=entropy)
    fit(module, make_items([1, 2]), max_steps=5, callbacks=[recorder])
    assert [m["grpo/kl_beta"] for m in recorder.metrics] == pytest.approx([0.2, 0.4 / 3, 0.2 / 3, 0.0, 0.0])
    paid = [m["grpo/entropy_coefficient"] for m in recorder.metrics]
    assert paid == pytest.approx([0.0, 0.2, 0.3, 0.4, 0.5])  # none before the first measurement
    assert (
        recorder.metrics[2]["grpo/kl"] > 0 and recorder.metrics[3]["grpo/kl"] == 0
    )  # β is 0: no pass of the reference


def test_after_a_refresh_the_distance_starts_again(build, make_items, fit, easy):
    recorder = Recorder()
    fit(build(kl_beta=0.001, reference_every=3), make_items([1, 2]), max_steps=7, callbacks=[recorder])
    kl = [m["grpo/kl"] for m in recorder.metrics]
    assert kl[0] > 1e-4 and all(kl[n] < 1e-6 for n in (3, 6)) and all(kl[n] > 1e-6 for n in (2, 5))


def test_ranks_hold_one_entropy_coefficient_and_one_count(build, make_items, fit, monkeypatch, tmp_path):
    """Rank 1's groups are all equal: it counts them, and both ranks end with the same weights and coefficient."""
    items = make_items([1, 3])

    def equal_on_rank_1(text, answer, image_sizes, *rest):
        constant = image_sizes == items[1].image_sizes
        return flat_reward(0.6) if constant else letters(text, answer, image_sizes, *rest)

    use_reward(monkeypatch, equal_on_rank_1)

    class Save(Callback):
        def on_train_end(self, trainer, module):
            state = module._entropy.state_dict() | {"weights": trained_weights(module.policy)}
            torch.save(state, tmp_path / f"rank{trainer.global_rank}.pt")

    entropy = EntropySettings(0.1, target=100.0, step=0.1)
    module = build(kl_beta=0.01, entropy=entropy, normalise_over="all", reference_every=1)
    fit(module, items, num_items=1, max_steps=2, strategy="ddp_fork", devices=2, callbacks=[Save()])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert (first["value"], first["last"]) == (second["value"], second["last"]) and first["value"] == pytest.approx(0.3)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_a_sharded_policy_refuses_a_refresh(build):
    module = build(kl_beta=0.1, reference_every=5)
    module.policy.sharded = object()
    with pytest.raises(ValueError, match=r"loss\.reference_every=5 with trainer\.strategy='sharded'"):
        module.on_fit_start()
