"""The GRPO module on a tiny random model: what a step computes, what it leaves alone, that it repeats and learns."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.persistence.problems import collect_problems
from datamodules.samples.sample import ChoiceAnswer
from lightning_modules import group_objective
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.rl.grpo_settings import RolloutSettings
from lightning_modules.rl.loss_settings import REDUCTIONS
from lightning_modules.rl.losses import LossTerms
from lightning_modules.rl.rollout_log import read_index
from lightning_modules.rollouts.base import RolloutRequest
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.training.non_finite import NonFiniteLoss
from lightning_modules.training.seeds import derive_seed
from tests.lightning_modules.conftest import trained_weights
from tests.lightning_modules.grpo_modules import Recorder, RecordingEngine, build_grpo, flat_reward, letters, use_reward

MAX_NEW = 8


@pytest.fixture
def easy(monkeypatch):
    use_reward(monkeypatch, letters)


@pytest.fixture
def build(tiny_model_dir, lora):
    def make(**settings):
        small = {"lora": lora, "group_size": 4, "temperature": 1.0, "max_new_tokens": MAX_NEW, "learning_rate": 1e-3}
        return build_grpo(str(tiny_model_dir), **small | settings)

    return make


def stir(module):
    """Move the adapter away from its start, where policy and reference are the same model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.policy.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def values(module):
    return [parameter.detach().clone() for parameter in module.policy.trainable_parameters()]


def written_out_loss(module, seen, advantages):
    """Minus eq. 2 over groups, each completion alone in its row; [C] advantages in order, equal groups left out."""
    policy, sums, lengths = module.policy, [], []
    for (item, rollouts), group_advantages in zip(seen, advantages, strict=True):
        features = policy.encode_images([item])
        for rollout, advantage in zip(rollouts, group_advantages, strict=True):
            if not any(group_advantages) or (module.update_settings.mask_truncated and not rollout.finished):
                continue
            (rows,) = pack_rows([item], [[rollout.token_ids]], 100_000)
            log_probs = policy.token_log_probs(rows, features, module.rollout_settings.temperature)
            reference = policy.token_log_probs(rows, features, module.rollout_settings.temperature, reference=True)
            difference = reference - log_probs
            kl = torch.exp(difference) - difference - 1
            ratio = torch.exp(log_probs - log_probs.detach())
            sums.append((module.loss_settings.kl_beta * kl - ratio * advantage).sum())
            lengths.append(len(log_probs))
    if module.loss_settings.reduction == "completion":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    most = {"dr_grpo": module.rollout_settings.max_new_tokens, "completion_sum": 1}
    reduction = module.loss_settings.reduction
    return sum(sums) / (sum(lengths) if reduction == "token" else len(sums) * most[reduction])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("max_tokens_per_row", [10, 4096])
def test_gradient_of_a_window_is_that_of_the_written_out_equation(
    build, make_items, fit, monkeypatch, reduction, max_tokens_per_row
):
    """Over two batches, one group of equal rewards among them, however the rows are packed."""
    items = make_items([1, 2, 1, 3])

    def constant_for_one(text, answer, image_sizes, *rest):
        if image_sizes is items[2].image_sizes:
            return flat_reward(0.6)  # FIELD 8: not a mean of 0 or 1
        return letters(text, answer, image_sizes, *rest)

    use_reward(monkeypatch, constant_for_one)
    settings = {"kl_beta": 0.05, "accumulate": 2, "max_grad_norm": None, "max_tokens_per_row": max_tokens_per_row}
    module, recorder = build(reduction=reduction, **settings), Recorder()
    module.configure_model()
    stir(module)
    start, module.engine = trained_weights(module.policy), RecordingEngine(module.engine)
    fit(module, items, max_steps=1, callbacks=[recorder])
    module.policy.load_state_dict(start, strict=False)
    advantages = [record["advantages"] for record in recorder.records]
    assert [any(group) for group in advantages] == [True, True, False, True]
    expected = torch.autograd.grad(
        written_out_loss(module, module.engine.seen, advantages), module.policy.trainable_parameters()
    )
    for got, want in zip(recorder.gradients[0], expected, strict=True):
        size = MAX_NEW if reduction == "completion_sum" else 1  # a sum over tokens is larger than a mean
        torch.testing.assert_close(got, want, atol=1e-6 * size, rtol=2e-3)
    assert [m["grpo/frac_zero_advantage"] for m in recorder.metrics] == [0.25], "one log of the window's four groups"
    assert all(m["grpo/kl"] > 0 and m["grpo/clip_fraction"] == 0 for m in recorder.metrics)


def test_step_is_deterministic(build, make_items, fit, easy):
    items = make_items([1, 2, 1])
    runs = []
    for _ in range(2):
        module, recorder = build(), Recorder()
        fit(module, items, max_steps=2, callbacks=[recorder])
        runs.append((recorder.records, values(module)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    other, recorder = build(seed=1), Recorder()
    fit(other, items, max_steps=2, callbacks=[recorder])
    assert recorder.records != runs[0][0]


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"epochs_per_rollout": 2, "accumulate": 2}])
def test_resume_equals_a_run_left_alone(build, make_items, fit, easy, tmp_path, settings):
    """Same sample ids, texts, rewards and weights, though the checkpoint may fall inside a window."""
    items = make_items([1, 2, 1, 1, 2])
    accumulate = settings.get("accumulate", 1)

    class Killed(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx + 1 == 2 * accumulate - 1 + (accumulate == 1):
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    whole, resumed = Recorder(), Recorder()
    module = build(**settings)
    fit(module, items, max_steps=4, callbacks=[whole])
    fit(build(**settings), items, max_steps=4, callbacks=[Killed()])
    again = build(**settings)
    trainer = fit(again, items, max_steps=4, callbacks=[resumed], ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == 4
    assert resumed.records == whole.records[-len(resumed.records) :] and resumed.records
    assert all(torch.equal(a, b) for a, b in zip(values(module), values(again), strict=True))


def test_a_batch_without_advantage_changes_nothing(build, make_items, fit, monkeypatch):
    """FIELD 12: it neither raises nor steps, and it is logged; the next batch trains as if it had not been."""
    use_reward(monkeypatch, lambda *_: flat_reward(0.6))
    module, recorder = build(kl_beta=0.1, weight_decay=0.5), Recorder()
    module.configure_model()
    stir(module)
    before = values(module)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 2

    trainer = fit(module, make_items([1, 2]), max_steps=100, callbacks=[recorder, Stop()])
    assert all(torch.equal(a, b) for a, b in zip(before, values(module), strict=True))
    assert trainer.global_step == 0 and not trainer.optimizers[0].state and module.num_batches == 3
    assert all(metrics["grpo/frac_zero_advantage"] == 1 for metrics in recorder.metrics)
    assert "grpo/kl" not in recorder.metrics[-1]  # a mean of nothing is no number
    assert trainer.datamodule.position == 3


def test_groups_without_advantage_can_be_kept_for_their_kl_term(build, make_items, fit, monkeypatch):
    use_reward(monkeypatch, lambda *_: flat_reward(0.6))
    module = build(kl_beta=0.1, skip_zero_advantage=False)
    module.configure_model()
    stir(module)
    before = values(module)
    assert fit(module, make_items([1, 2]), max_steps=1).global_step == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, values(module), strict=True))


def test_truncated_completions_are_counted_and_can_be_masked(build, make_items, fit, easy):
    """Of two tokens hardly any random completion is ended; the masked ones are not in the loss."""
    recorder = Recorder()

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    module = build(max_new_tokens=2, mask_truncated=True, group_size=16)
    module.configure_model()
    module.engine = RecordingEngine(module.engine)
    trained = []
    module.add_gradient = lambda groups: trained.extend(c for group in groups for c in group.completions)
    fit(module, make_items([1, 2]), max_steps=5, callbacks=[recorder, Stop()])
    rollouts = [rollout for _, group in module.engine.seen for rollout in group]
    finished = [rollout.finished for rollout in rollouts]
    assert recorder.metrics[0]["grpo/frac_truncated"] == pytest.approx(1 - sum(finished) / len(finished))
    assert not all(finished)
    assert len(trained) == sum(finished) and all(c[-1].item() in module.policy.eos_ids for c in trained)


@pytest.mark.parametrize("old_log_probs", ["trainer", "sampler"])
def test_several_updates_to_a_rollout(build, make_items, fit, easy, old_log_probs):
    """The first update has ratio 1; later ones measure how far the policy has moved since the rollout."""
    settings = {"epochs_per_rollout": 2, "minibatches": 2, "accumulate": 2, "old_log_probs": old_log_probs}
    module, recorder = build(kl_beta=0.0, learning_rate=3e-2, **settings), Recorder()
    trainer = fit(module, make_items([1, 2, 1, 1]), max_steps=4, callbacks=[recorder])
    assert trainer.global_step == 4 and module.num_batches == 2
    assert len(recorder.gradients) == 4
    assert recorder.metrics[-1]["grpo/clip_fraction"] > 0
    assert not module._batches


def test_trainer_and_engine_agree_on_the_old_log_probs(build, make_items, easy, fit, monkeypatch):
    seen = []
    original = group_objective.policy_loss

    def noting(inputs, settings):
        seen.append((inputs.log_probs.detach(), inputs.old_log_probs))
        return original(inputs, settings)

    monkeypatch.setattr(group_objective, "policy_loss", noting)
    for old_log_probs in ("trainer", "sampler"):
        fit(build(epochs_per_rollout=2, old_log_probs=old_log_probs), make_items([1, 2]), max_steps=1)
    (now, trainer_old), (_, engine_old) = seen[0], seen[len(seen) // 2]
    torch.testing.assert_close(trainer_old, now)
    torch.testing.assert_close(engine_old, now, atol=1e-4, rtol=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    build, make_items, fit, easy, monkeypatch, tmp_path
):
    def broken(inputs, settings):
        return LossTerms(inputs.log_probs.sum() * float("nan"), 1.0, 1, 0.0, 0.0)

    monkeypatch.setattr(group_objective, "policy_loss", broken)
    with pytest.raises(NonFiniteLoss, match="sample/0") as error:
        fit(build(), make_items([1, 2]), max_steps=2)
    assert error.value.step == 0 and error.value.sample_ids == ["sample/0", "sample/1"]
    assert json.loads((tmp_path / "nonfinite.json").read_text())["sample_ids"] == ["sample/0", "sample/1"]


def test_rollouts_are_logged(build, make_items, fit, easy, tmp_path):
    module = build(log=str(tmp_path / "log" / "rollouts.jsonl"))
    fit(module, make_items([1, 2, 1]), max_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "log" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["sample/0", "sample/1", "sample/2", "sample/0"]
    assert lines[-2:] == module.last_rollouts
    assert len(lines[0]["texts"]) == len(lines[0]["rewards"]) == len(lines[0]["advantages"]) == 4
    assert lines[0]["task"] == "referring" and lines[0]["answer"]["box"] == [0.1, 0.2, 0.6, 0.9]


def test_every_other_batch_is_logged_in_the_runs_folder(build, make_items, fit, easy, tmp_path):
    fit(build(log="rollouts.jsonl", log_every=2), make_items([1, 2, 1]), max_steps=3)
    assert [group.batch for group in read_index(tmp_path / "rollouts.jsonl")] == [0, 0, 2, 2]


def test_real_reward_of_random_text_is_zero_and_harmless(build, make_items, fit):
    """Nothing replaced: random text earns nothing, so every group is equal."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    trainer = fit(build(), make_items([1, 2]), max_steps=3, callbacks=[Stop()])
    assert trainer.callback_metrics["reward/total"] == 0 and trainer.global_step == 0


def test_answer_that_cannot_be_rewarded_is_an_error_that_names_the_sample(build, make_items, fit):
    items = make_items([1, 2])
    choice = ChoiceAnswer("A", ("left", "right"))
    items[1] = replace(items[1], sample=replace(items[1].sample, answer=choice))
    with pytest.raises(ValueError, match="'sample/1' cannot be rewarded"):
        fit(build(), items, max_steps=1)


@pytest.mark.parametrize("settings", [{"lora": None}, {"freeze_vision": False, "max_tokens_per_row": 10}])
def test_other_trained_parts_use_a_copy_as_reference(build, make_items, fit, easy, settings):
    module, recorder = build(kl_beta=0.1, learning_rate=1e-4, **settings), Recorder()
    fit(module, make_items([1, 2]), max_steps=3, callbacks=[recorder])
    assert module.policy.reference_model is not None
    assert recorder.metrics[0]["grpo/kl"] == pytest.approx(0, abs=1e-6)
    assert recorder.metrics[-1]["grpo/kl"] > 1e-7


def test_ranks_of_which_one_has_nothing_to_learn_do_not_hang(build, make_items, fit, monkeypatch, tmp_path):
    """FIELD 12: rank 1's groups are all equal; both take the same updates and end with the same weights."""
    items = make_items([1, 3])

    def equal_on_rank_1(text, answer, image_sizes, *rest):
        constant = image_sizes == items[1].image_sizes
        return flat_reward(0.6) if constant else letters(text, answer, image_sizes, *rest)

    use_reward(monkeypatch, equal_on_rank_1)

    class Save(Callback):
        def on_train_end(self, trainer, module):
            torch.save(trained_weights(module.policy), tmp_path / f"rank{trainer.global_rank}.pt")

    module = build(kl_beta=0.01)
    fit(module, items, num_items=1, max_steps=2, strategy="ddp_fork", devices=2, callbacks=[Save()])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((value != 0).any() for name, value in first.items() if "lora_B" in name)


def test_reward_rises(build, make_items, fit, easy):
    """The learning test: after sixty updates the easy reward is clearly above where it began.

    At twice the learning rate all completions soon get one reward: then no batch updates, and max_steps never comes.
    """
    recorder = Recorder()
    module = build(group_size=8, learning_rate=5e-3, kl_beta=0.001)
    fit(module, make_items([1, 1]), max_steps=60, callbacks=[recorder])
    rewards = [metrics["reward/total"] for metrics in recorder.metrics]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > first + 0.15, f"{first:.3f} -> {last:.3f}"


def test_all_bad_settings_are_named_before_weights_are_read():
    """Those of one group by its class, and where a whole module is built in `collect_problems` those of all."""
    with pytest.raises(ValueError) as error:
        RolloutSettings(group_size=1, temperature=0, engine="vLLM")
    for text in ("rollout.group_size=1", "rollout.temperature=0", "rollout.engine='vLLM'"):
        assert text in str(error.value)
    bad = {"group_size": 1, "temperature": 0, "kl_beta": -1, "clip_low": 2.0, "clip_high": 0, "minibatches": 0}
    with collect_problems() as faults:
        build_grpo("no/such/model", accumulate=0, reward_weights={"length": 1.0}, **bad)
    places = ["rollout", "rollout", "loss", "loss", "loss", "update"]
    named = [f"{place}.{name}={value}" for place, (name, value) in zip(places, bad.items(), strict=True)]
    for text in (*named, "accumulate=0", "reward_weights.length=1.0: there is no such reward"):
        assert sum(fault.startswith(text) for fault in faults) == 1, text
    assert len(faults) == 8


def test_a_name_that_is_none_of_those_known_falls_back_on_nothing():
    with collect_problems() as faults:
        build_grpo("no/such/model", reduction="mean", old_log_probs="rollout", engine="vLLM")
    assert [fault.split(" must")[0] for fault in sorted(faults)] == [
        "loss.reduction='mean'",
        "rollout.engine='vLLM'",
        "update.old_log_probs='rollout'",
    ]


def test_seeds_differ_by_every_part_and_never_change():
    seeds = {derive_seed(*parts) for parts in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10), (1, 0)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 0, 0) == 8387133978117270309


def test_a_window_has_the_texts_of_its_batches_sampled_one_by_one(build, make_items, fit, easy):
    """Seeds belong to prompts, so what is sampled does not depend on what is sampled beside it."""
    module, recorder = build(accumulate=2), Recorder()
    module.configure_model()
    seeds, module.engine = [], RecordingEngine(module.engine)
    items, generate = make_items([1, 2, 1, 3]), module.engine.generate

    def noting(request):
        seeds.append(list(zip(request.items, request.seeds, strict=True)))
        return generate(request)

    module.engine.generate = noting
    start = trained_weights(module.policy)
    fit(module, items, max_steps=1, callbacks=[recorder])
    assert [len(window) for window in seeds] == [4], "one request for the window"
    module.policy.load_state_dict(start, strict=False)
    for number, (item, seed) in enumerate(seeds[0]):
        request = RolloutRequest([item], module.rollout_settings, seeds=[seed])
        (alone,) = NativeEngine(module.policy).generate(request)
        assert [rollout.text for rollout in alone] == recorder.records[number]["texts"]
