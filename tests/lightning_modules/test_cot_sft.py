"""Supervised training: which tokens count, how they are averaged, that it learns and resumes exactly."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from datamodules.encoding.encoder import Batch
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.training.optim import cosine_factor
from tests.lightning_modules.conftest import trained_weights


class Recorder(Callback):
    """Losses of every batch, and the gradients of every update before the optimizer uses them."""

    def __init__(self):
        self.metrics, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([p.grad.clone() for p in module.policy.trainable_parameters()])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def plain_loss_sum(policy, item):
    """Sum of -log p over one item's completion, through transformers' own forward with pixels; and the tokens."""
    ids = torch.cat([item.input_ids, item.completion_ids])[None]
    output = policy.base(
        input_ids=ids,
        mm_token_type_ids=(ids == policy.image_token_id).long(),
        pixel_values=item.pixel_values,
        image_grid_thw=item.grid_thw,
    )
    start = len(item.input_ids)
    logits = output.logits[0, start - 1 : -1]
    hits = (logits.argmax(-1) == item.completion_ids).sum().item()
    return F.cross_entropy(logits, item.completion_ids, reduction="sum"), hits, len(item.completion_ids)


@pytest.mark.parametrize("max_tokens_per_row", [10, 100_000])
def test_loss_and_gradient_are_the_token_mean_over_the_whole_window(
    tiny_model_dir, make_items, fit, lora, max_tokens_per_row
):
    items = make_items([1, 2, 1, 3], with_target=True)
    settings = {"lora": lora, "max_grad_norm": None, "accumulate": 2, "max_tokens_per_row": max_tokens_per_row}
    module, recorder = CoTSFT(str(tiny_model_dir), **settings), Recorder()
    module.configure_model()
    sums = [plain_loss_sum(module.policy, item) for item in items]
    expected = sum(s[0] for s in sums) / sum(s[2] for s in sums)
    expected_gradients = torch.autograd.grad(expected, module.policy.trainable_parameters())
    fit(module, items, max_steps=1, callbacks=[recorder])
    for got, want in zip(recorder.gradients[0], expected_gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)
    for index, metrics in enumerate(recorder.metrics):
        loss, hits, tokens = (sum(column) for column in zip(*sums[2 * index : 2 * index + 2], strict=True))
        assert metrics["train/loss"] == pytest.approx(loss.item() / tokens, rel=1e-4)
        assert metrics["train/token_accuracy"] == pytest.approx(hits / tokens, abs=1e-6)
        assert metrics["train/tokens"] == tokens


def test_targets_are_the_completion_with_its_end_and_nothing_else(make_items, tiny_model_dir):
    module = CoTSFT(str(tiny_model_dir))
    module.configure_model()
    seen = []
    module.policy.token_log_probs = lambda rows, features, **_: (
        seen.append(rows),
        (torch.zeros(len(rows.targets)), torch.zeros(len(rows.targets))),
    )[1]
    items = make_items([2, 1], with_target=True)
    module.backward_sum = lambda total, count: None
    module._backward(Batch(items))
    targets = torch.cat([rows.targets for rows in seen])
    assert torch.equal(targets, torch.cat([item.completion_ids for item in items]))
    assert targets[len(items[0].completion_ids) - 1].item() in module.policy.eos_ids


def test_it_learns_the_samples_by_heart(tiny_model_dir, make_items, fit, lora):
    recorder = Recorder()
    module = CoTSFT(str(tiny_model_dir), lora=lora, learning_rate=5e-3)
    items = make_items([1, 2], with_target=True)
    fit(module, items, max_steps=25, callbacks=[recorder])
    losses = [metrics["train/loss"] for metrics in recorder.metrics]
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_parts_do_not_move(tiny_model_dir, make_items, fit, lora):
    module = CoTSFT(str(tiny_model_dir), lora=lora, learning_rate=1e-2)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, make_items([1, 1], with_target=True), max_steps=2)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora" in name and "language_model" in name for name in moved)


def test_full_training_with_the_vision_tower(tiny_model_dir, make_items, fit):
    module = CoTSFT(str(tiny_model_dir), freeze_vision=False, max_tokens_per_row=10, learning_rate=1e-3)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, make_items([1, 2], with_target=True), max_steps=1)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_equals_a_run_left_alone(tiny_model_dir, make_items, fit, lora, tmp_path, accumulate):
    """With accumulation the checkpoint is taken inside a window, whose gradient is then computed again."""
    items = make_items([1, 2, 1, 1, 2], with_target=True)

    def build():
        settings = {"lora": lora, "learning_rate": 1e-3, "accumulate": accumulate, "warmup_fraction": 0.3}
        return CoTSFT(str(tiny_model_dir), **settings)

    class Killed(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx + 1 == 2 * accumulate + (accumulate - 1):
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    whole = build()
    fit(whole, items, max_steps=4)
    fit(build(), items, max_steps=4, callbacks=[Killed()])
    resumed = build()
    trainer = fit(resumed, items, max_steps=4, ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == 4 and resumed.num_batches == whole.num_batches
    for a, b in zip(whole.policy.trainable_parameters(), resumed.policy.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_holds_only_what_is_trained_and_loads_as_data(tiny_model_dir, make_items, fit, lora, tmp_path):
    module = CoTSFT(str(tiny_model_dir), lora=lora)
    trainer = fit(module, make_items([1, 1], with_target=True), max_steps=1)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    checkpoint = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert checkpoint["state_dict"] and all("lora" in name for name in checkpoint["state_dict"])
    other = CoTSFT(str(tiny_model_dir))
    with pytest.raises(ValueError, match="checkpoint does not fit"):
        fit(other, make_items([1, 1], with_target=True), max_steps=2, ckpt_path=tmp_path / "small.ckpt")


def test_ranks_with_different_batches_train_as_one(tiny_model_dir, make_items, fit, lora, tmp_path):
    """Two ranks with unlike numbers of rows give the update of one process that accumulates both batches."""
    items = make_items([1, 3], with_target=True)
    settings = {"lora": lora, "max_tokens_per_row": 10, "learning_rate": 1e-2, "weight_decay": 0.1}

    class Save(Callback):
        def on_train_end(self, trainer, module):
            torch.save(trained_weights(module.policy), tmp_path / f"rank{trainer.global_rank}.pt")

    one = CoTSFT(str(tiny_model_dir), accumulate=2, **settings)
    fit(one, items, num_items=1, max_steps=2)
    two = CoTSFT(str(tiny_model_dir), **settings)
    fit(two, items, num_items=1, max_steps=2, strategy="ddp_fork", devices=2, callbacks=[Save()])
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in trained_weights(one.policy).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, atol=1e-5, rtol=1e-3)


def test_sample_without_target_is_an_error_that_names_it(tiny_model_dir, make_items, fit):
    with pytest.raises(ValueError, match="'sample/0' has no target"):
        fit(CoTSFT(str(tiny_model_dir)), make_items([1, 1]), max_steps=1)


def test_all_bad_settings_are_named_before_weights_are_read():
    with pytest.raises(ValueError) as error:
        CoTSFT("no/such/model", learning_rate=0, accumulate=0, warmup_fraction=1.5)
    assert all(text in str(error.value) for text in ("learning_rate=0", "accumulate=0", "warmup_fraction=1.5"))


@pytest.mark.parametrize(
    ("dtype", "lora", "freeze_vision", "named"),
    [
        ("bfloat16", None, True, ["dtype='bfloat16'", "lora=None"]),
        ("bfloat16", LoraSettings(), False, ["dtype='bfloat16'", "freeze_vision=False"]),
        ("float16", LoraSettings(), True, ["dtype='float16'"]),
    ],
)
def test_weights_are_not_trained_in_a_precision_that_loses_updates(dtype, lora, freeze_vision, named):
    with pytest.raises(ValueError) as caught:
        CoTSFT("nowhere", dtype=dtype, lora=lora, freeze_vision=freeze_vision)
    assert all(part in str(caught.value) for part in [*named, "float32"])
    CoTSFT("nowhere", dtype="bfloat16", lora=LoraSettings())
    CoTSFT("nowhere", lora=None, freeze_vision=False)


def test_a_schedule_without_an_end_is_an_error(tiny_model_dir, make_items, fit, lora):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        fit(CoTSFT(str(tiny_model_dir), lora=lora), make_items([1, 1], with_target=True), max_epochs=-1)


def test_cosine_schedule():
    factors = [cosine_factor(step, 2, 10) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    for step in range(2, 11):
        assert factors[step] == pytest.approx((1 + math.cos(math.pi * (step - 2) / 8)) / 2)
    assert factors[10] == pytest.approx(0) and cosine_factor(99, 2, 10) == pytest.approx(0)
