"""The last window of a run, which may hold fewer batches than others, is stepped, as Hugging Face's Trainer does."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import get_cosine_schedule_with_warmup

from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.attention.packed_rows import pack_rows
from tests.lightning_modules.conftest import trained_weights
from tests.lightning_modules.grpo_modules import build_grpo, letters, use_reward
from tests.lightning_modules.ranks import run_ranks

EPOCH = {"max_epochs": 1, "limit_train_batches": 5}


@pytest.fixture
def build(tiny_model_dir, lora, monkeypatch):
    use_reward(monkeypatch, letters)

    def make(phase="sft", **settings):
        shared = {"lora": lora, "accumulate": 2, "learning_rate": 1e-3, "max_grad_norm": None} | settings
        if phase == "sft":
            return CoTSFT(str(tiny_model_dir), **shared)
        return build_grpo(str(tiny_model_dir), group_size=4, temperature=1.0, max_new_tokens=6, **shared)

    return make


class Recorder(Callback):
    def __init__(self):
        self.gradients, self.rates, self.weights = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([p.grad.clone() for p in module.policy.trainable_parameters()])
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.weights.append(trained_weights(module.policy))


def hugging_face_rates(num_updates: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, num_updates)
    rates = []
    for _ in range(num_updates):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_five_batches_in_windows_of_two_are_three_updates(build, make_items, fit):
    """The third update's gradient is the mean over the tokens of the one batch, at Hugging Face's learning rate."""
    items, recorder = make_items([1, 2, 1, 3, 2], with_target=True), Recorder()
    module = build()
    trainer = fit(module, items, 1, callbacks=[recorder], **EPOCH)
    assert trainer.global_step == 3 and not module.window_is_open
    assert recorder.rates == pytest.approx(hugging_face_rates(3))

    module.policy.load_state_dict(recorder.weights[2], strict=False)
    (rows,) = pack_rows(items[4:], [[items[4].completion_ids]], 4096)
    log_probs = module.policy.token_log_probs(rows, module.policy.encode_images(items[4:]), ban_tokens=False)
    expected = torch.autograd.grad(-log_probs.mean(), module.policy.trainable_parameters())
    for got, want in zip(recorder.gradients[2], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_the_last_window_reaches_over_epochs_and_is_stepped_once(build, make_items, fit, phase):
    """Two epochs of five batches in windows of four: 4 + 4 + 2."""
    items = make_items([1, 2, 1, 3, 2], with_target=True)
    module, recorder = build(phase, accumulate=4), Recorder()
    trainer = fit(module, items, 1, callbacks=[recorder], max_epochs=2, limit_train_batches=5)
    assert trainer.global_step == len(recorder.rates) == 3 and module.num_batches == 10
    assert recorder.rates == pytest.approx(hugging_face_rates(3))


def test_a_run_of_several_updates_to_a_window_makes_them_for_the_last_too(build, make_items, fit):
    module = build("grpo", epochs_per_rollout=2, minibatches=2)
    assert fit(module, make_items([1, 2, 1]), 2, **EPOCH).global_step == 3 * 4


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_ranks_step_the_last_window_together_and_as_one_process_would(build, make_items, fit, phase):
    items = make_items([1, 2, 1, 3, 2, 1], with_target=True)

    def work():
        torch.set_num_threads(1)
        module = build(phase)
        trainer = fit(module, items, 1, max_epochs=1, limit_train_batches=3, strategy="ddp", devices=2)
        return trainer.global_step, {name: value.numpy() for name, value in trained_weights(module.policy).items()}

    (steps, first), (others, second) = run_ranks(2, work)
    assert steps == others == 2
    assert all((first[name] == second[name]).all() for name in first)
    if phase == "sft":
        one = build(phase)
        assert fit(one, items, 2, max_epochs=1, limit_train_batches=3).global_step == 2
        for name, value in trained_weights(one.policy).items():
            torch.testing.assert_close(torch.from_numpy(first[name]), value, atol=1e-5, rtol=1e-3)


def test_max_steps_still_ends_a_run_first(build, make_items, fit):
    module, recorder = build(), Recorder()
    trainer = fit(module, make_items([1, 2], with_target=True), 1, callbacks=[recorder], max_steps=2, **EPOCH)
    assert trainer.global_step == 2 and module.num_batches == 4
    assert recorder.rates == pytest.approx(hugging_face_rates(2))


@pytest.mark.parametrize("phase", ["sft", "grpo"])
@pytest.mark.parametrize("from_checkpoint", [True, False])
def test_a_module_that_was_stopped_inside_a_window_begins_it_anew(
    build, make_items, fit, tmp_path, phase, from_checkpoint
):
    """In the same process, as in a notebook: nothing of the open window is left. Rollouts draw the same numbers."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.should_stop = module.num_batches == (3 if from_checkpoint else 1)

        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    items, updates = make_items([1, 2, 1, 3, 2], with_target=True), {"max_steps": 3}
    whole, stopped = build(phase), build(phase)
    fit(whole, items, 1, **updates)
    assert fit(stopped, items, 1, callbacks=[Stop()], **updates).global_step == from_checkpoint
    checkpoint = tmp_path / "stopped.ckpt" if from_checkpoint else None
    assert fit(stopped, items, 1, ckpt_path=checkpoint, **updates).global_step == 3
    expected = trained_weights(whole.policy)
    assert all(torch.equal(value, expected[name]) for name, value in trained_weights(stopped.policy).items())
