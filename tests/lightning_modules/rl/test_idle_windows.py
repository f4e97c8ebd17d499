"""GRPO that learns nothing ends, says why, and goes on counting where it is started again."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_modules.rl.grpo_settings import UpdateSettings
from lightning_modules.rl.idle_windows import IdleWindows
from lightning_modules.rl.metrics import GRPOMetrics
from lightning_modules.rollouts.base import SamplingSettings
from lightning_modules.training.endings import IdleTooLong
from tests.lightning_modules.grpo_modules import flat_reward, letters, use_reward
from tests.lightning_modules.ranks import run_ranks

NOTHING = flat_reward(0.0, "empty")
SAMPLING = SamplingSettings(group_size=4, temperature=0.7, max_new_tokens=16)


def step(informative: int = 0, format: int = 0, **sums: float) -> dict[str, float]:
    """The sums of a batch of two groups of four."""
    metrics = GRPOMetrics()
    metrics.update(groups=2, completions=8, informative=informative, well_formed=format, **sums)
    return metrics.compute()


def test_windows_in_a_row_are_counted_and_an_informative_group_starts_anew():
    idle = IdleWindows()
    for informative, expected in ((0, 1), (0, 2), (1, 0), (0, 1)):
        idle.add(step(informative))
        assert idle.number == expected
    assert idle.state_dict()["counts"]["completions"] == 8, "of the last window alone"


def test_counts_go_on_from_a_checkpoint():
    idle, resumed = IdleWindows(), IdleWindows()
    idle.add(step(zero_iou=8))
    resumed.load_state_dict(idle.state_dict())
    resumed.add(step(zero_iou=8))
    assert (resumed.number, resumed.state_dict()["counts"]["zero_iou"]) == (2, 16)


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        ({"failed": 8, "zero_iou": 8}, "no completion could be judged: see the warnings"),
        ({"failed": 2, "left_out": 8, "right": 8}, "every group has a completion that could not be judged"),
        ({"truncated": 8, "zero_iou": 8}, "every completion was cut at rollout.max_new_tokens=16"),
        ({"zero_iou": 8}, "every completion has IoU 0 and none has the format"),
        ({"zero_iou": 8, "format": 8, "truncated": 1}, "every completion has IoU 0: the prompts are too hard"),
        ({"right": 8, "format": 8}, "every completion is right"),
        ({"right": 4, "zero_iou": 4}, "no completion has the format"),
        (
            {"right": 4, "zero_iou": 4, "format": 7},
            "the completions of a group are alike: raise rollout.temperature=0.7",
        ),
    ],
)
def test_the_reason_is_read_from_what_was_counted(sums, words):
    idle = IdleWindows()
    idle.add(step(**sums))
    idle.require_fewer_than(2, SAMPLING)
    idle.require_fewer_than(None, SAMPLING)
    with pytest.raises(IdleTooLong) as caught:
        idle.require_fewer_than(1, SAMPLING)
    message = str(caught.value)
    assert words in message and "8 completions" in message and "max_idle_windows=1 " in message
    assert len(message.splitlines()) <= 5


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("skip_zero_advantage", [True, False])
def test_a_run_without_any_informative_group_ends(build, make_items, fit, monkeypatch, accumulate, skip_zero_advantage):
    """Also where equal groups are kept for their KL term: there is no preference in them."""
    use_reward(monkeypatch, lambda *_: NOTHING)
    module = build(max_idle_windows=3, accumulate=accumulate, skip_zero_advantage=skip_zero_advantage, kl_beta=0.1)
    with pytest.raises(IdleTooLong, match="no group of the last 3 windows"):
        fit(module, make_items([1, 2]), max_steps=50)
    assert module.num_batches == 3 * accumulate


def test_a_group_whose_better_completions_are_masked_is_not_informative(build, make_items, fit, monkeypatch):
    """Two tokens end hardly any completion of a random model; those that are not masked are alike."""
    use_reward(monkeypatch, letters)
    settings = {"max_new_tokens": 2, "max_idle_windows": 2, "mask_truncated": True}
    module = build(**settings)
    module.configure_model()
    generate = module.engine.generate

    def cut(*arguments, **named):
        groups = generate(*arguments, **named)
        for rollout in (rollout for group in groups for rollout in group):
            object.__setattr__(rollout, "finished", False)
        return groups

    module.engine.generate = cut
    with pytest.raises(IdleTooLong, match=r"every completion was cut at rollout\.max_new_tokens=2"):
        fit(module, make_items([1, 2]), max_steps=50)


def test_a_resumed_run_goes_on_counting(build, make_items, fit, monkeypatch, tmp_path):
    use_reward(monkeypatch, lambda *_: NOTHING)
    items = make_items([1, 2])

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:  # the first batch of the second window
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    settings = {"accumulate": 2, "max_idle_windows": 3}
    fit(build(**settings), items, max_steps=50, callbacks=[Stop()])
    resumed = build(**settings)
    with pytest.raises(IdleTooLong, match="no group of the last 3 windows"):
        fit(resumed, items, max_steps=50, ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.num_batches == 6


def test_a_checkpoint_of_an_earlier_version_counts_from_zero(build, make_items, fit, monkeypatch, tmp_path):
    use_reward(monkeypatch, letters)
    items = make_items([1, 2])
    fit(build(), items, max_steps=1).save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    del checkpoint["policy_module"]["idle_windows"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert fit(build(), items, max_steps=2, ckpt_path=tmp_path / "old.ckpt").global_step == 2


def test_windows_are_counted_over_all_ranks(build, make_items, fit, monkeypatch):
    """Rank 1 never has an informative group; rank 0 has, then none has. Both end behind the same batch."""
    items = make_items([1, 3])
    calls = {"number": 0}

    def by_rank(text, answer, image_sizes, *rest):
        calls["number"] += 1
        is_first_rank = image_sizes == items[0].image_sizes
        return letters(text) if is_first_rank and calls["number"] <= 4 * 3 else NOTHING

    use_reward(monkeypatch, by_rank)

    def work():
        torch.set_num_threads(1)
        module = build(max_idle_windows=2)
        try:
            fit(module, items, 1, max_steps=50, strategy="ddp", devices=2)
        except IdleTooLong as error:
            return module.num_batches, str(error)
        return module.num_batches, "no end"

    (first, words), (second, others) = run_ranks(2, work)
    assert first == second == 5 and words == others
    assert "in each of 4 groups" in words and "16 completions" in words


def test_a_limit_that_is_no_number_of_windows_is_named():
    with pytest.raises(ValueError, match=r"update\.max_idle_windows=0 must be greater than 0, or null"):
        UpdateSettings(max_idle_windows=0)
