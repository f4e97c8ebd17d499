"""The served engine in one run of a Trainer: what servers are asked for at its start, and what is left at its end."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from callbacks.mig_bench import MIGBench
from callbacks.previews import Previews
from callbacks.rejection_sampling import RejectionSampling
from callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_modules.rollouts.vllm.server_pool import ServersLost
from lightning_modules.serving.openai_client import EndpointMisused
from tests.lightning_modules.conftest import served, trained_weights
from tests.lightning_modules.grpo_modules import letters, use_reward
from tests.vllm_stub import error

FILES = ("annotations.json", "images")
LONG = {"max_prompt_tokens": 4000, "max_new_tokens": 97}  # a token more than the stub takes


@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        ([RejectionSampling(max_new_tokens=4096)], "4097 in RejectionSampling"),
        ([MIGBench(*FILES, every_n_steps=5, **LONG)], "4097 in MIGBench"),
        ([MIGBench(*FILES, after=True, **LONG), MIGBench(*FILES, before=True, max_new_tokens=8)], "4097 in MIGBench"),
        ([Previews(*FILES, **LONG)], "4097 in Previews"),
        ([MIGBench(*FILES, before=True, **LONG), Previews(*FILES, max_new_tokens=5000)], "MIGBench, 5001 in Previews"),
    ],
)
def test_what_a_callback_will_ask_must_fit_too_and_is_told_before_anything_is_asked(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, callbacks, told
) -> None:
    for kind in (MIGBench, Previews):
        monkeypatch.setattr(kind, "setup", lambda *_, **__: None)  # there are no files
    with pytest.raises(EndpointMisused, match=rf"max_model_len=4096 of 'tiny'.* have: .*{told}; start it with"):
        short = {"max_steps": 1, "max_epochs": 1, "limit_train_batches": 1}
        fit(served(tiny_model_dir, lora, stub.url), make_items([1]), callbacks=callbacks, **short)
    assert stub.asked == 0


def test_callbacks_have_the_limits_of_training_unless_given_their_own() -> None:
    limits = (300, 40)
    assert RejectionSampling().longest_sequence(*limits) == 340
    assert RejectionSampling(max_new_tokens=50).longest_sequence(*limits) == 350
    assert Previews(*FILES, max_new_tokens=7).longest_sequence(*limits) == 307
    assert MIGBench(*FILES, every_n_steps=1, max_new_tokens=7).longest_sequence(*limits) == 307
    assert MIGBench(*FILES, after=True, max_prompt_tokens=20, max_new_tokens=7).longest_sequence(*limits) == 27
    assert MIGBench(*FILES).longest_sequence(*limits) == 0, "it asks nothing"


class Fail(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer, module, *_):
        raise self.error


@pytest.mark.parametrize(
    ("end", "raised"), [(ValueError("of training"), ValueError), (KeyboardInterrupt(), SystemExit)]
)
def test_a_run_that_ends_with_an_error_takes_its_adapter_away(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, tmp_path, end, raised
) -> None:
    use_reward(monkeypatch, letters)
    with pytest.raises(raised):
        fit(served(tiny_model_dir, lora, stub.url), make_items([1, 2]), max_steps=3, callbacks=[Fail(end)])
    assert stub.loads and not stub.adapters and not list((tmp_path / "adapters").iterdir())


def test_an_adapter_that_cannot_be_unloaded_hides_no_error(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, caplog
) -> None:
    use_reward(monkeypatch, letters)

    class FailAfterwards(Fail):
        def on_train_batch_end(self, *arguments):
            stub.wrap = lambda path, answer: (403, error("not you")) if path == "unload_lora_adapter" else answer()
            super().on_train_batch_end(*arguments)

    failing = FailAfterwards(ValueError("of training"))
    with pytest.raises(ValueError, match="of training"):
        fit(served(tiny_model_dir, lora, stub.url), make_items([1, 2]), max_steps=3, callbacks=[failing])
    assert "may still have this run's adapter" in caplog.text and "not you" in caplog.text
    assert stub.adapters


def same_weights(ours, theirs) -> bool:
    other = trained_weights(theirs.policy)
    return all(torch.equal(value, other[name]) for name, value in trained_weights(ours.policy).items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_servers_lost_after_an_update_do_not_make_a_run_train_on_the_window_again(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, tmp_path, accumulate
) -> None:
    """They die during the second update, and are missed when they should get its adapter."""
    use_reward(monkeypatch, letters)
    whole, lost, again = (served(tiny_model_dir, lora, stub.url, accumulate=accumulate) for _ in range(3))
    items, train_on = make_items([1, 2, 1]), lost.train_on
    fit(whole, items, max_steps=4)

    def dying(by_batch):
        train_on(by_batch)
        if lost.global_step == 2:
            lost.engine._pool.patience = 0.2
            stub.stop()

    lost.train_on = dying
    logger = CSVLogger(tmp_path, "log", "")
    with pytest.raises(ServersLost):
        fit(lost, items, max_steps=4, callbacks=[SaveOnInterrupt()], logger=logger)
    stub.start()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert fit(again, items, max_steps=4, ckpt_path=checkpoint).global_step == 4
    assert again.num_batches == whole.num_batches and same_weights(whole, again)
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["grpo/loss"]]
    assert [int(row["step"]) for row in rows] == [accumulate - 1, 2 * accumulate - 1], "both updates are logged"


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # the batches of this test are in memory
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_lost_its_servers_has_no_batch_more(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, tmp_path, staleness
) -> None:
    """The error comes out of a training step, which Lightning then has not counted as done."""
    use_reward(monkeypatch, letters)
    whole, lost, again = (served(tiny_model_dir, lora, stub.url, staleness=staleness) for _ in range(3))
    items, epochs = make_items([1, 2, 1]), {"max_epochs": 2, "limit_train_batches": 3}
    fit(whole, items, **epochs)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.num_batches == 2:
                module.engine._pool.patience = 0.2
                stub.stop()

    with pytest.raises(ServersLost):
        fit(lost, items, callbacks=[Stop(), SaveOnInterrupt()], **epochs)
    stub.start()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    fit(again, items, ckpt_path=checkpoint, **epochs)
    assert again.num_batches == whole.num_batches == 6 and same_weights(whole, again)
