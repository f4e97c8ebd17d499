"""Servers sample the next windows while the trainer updates: how old the policies are, and that nothing is lost."""

from __future__ import annotations

import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import WindowCheckpoint
from callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_modules.rollouts.base import RolloutRequest
from lightning_modules.rollouts.vllm.server_pool import ServersLost
from lightning_modules.training.endings import IdleTooLong
from tests.lightning_modules.conftest import served, trained_weights
from tests.lightning_modules.grpo_modules import Recorder, build_grpo, flat_reward, letters, use_reward
from tests.lightning_modules.ranks import run_ranks
from tests.vllm_stub import wait_for


@pytest.fixture
def build(stub, tiny_model_dir, lora, monkeypatch):
    use_reward(monkeypatch, letters)

    def make(staleness: int = 1, **settings):
        return served(tiny_model_dir, lora, stub.url, staleness=staleness, **settings)

    return make


def equal_weights(ours, theirs) -> bool:
    other = trained_weights(theirs.policy)
    return all(torch.equal(value, other[name]) for name, value in trained_weights(ours.policy).items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"staleness": 1}, r"rollout\.staleness=1, rollout\.engine='native': the native engine samples in the process"),
        ({"staleness": 3, "engine": "vllm"}, r"rollout\.staleness=3 must be one of 0, 1, 2"),
        ({"staleness": 1, "engine": "vllm"}, r"update\.importance_cap=None: an older policy has sampled"),
        (
            {"staleness": 1, "engine": "vllm", "importance_cap": 2.0, "refill_windows": 1},
            r"rollout\.staleness=1, update\.refill_windows=1: a window cannot be refilled",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_named(tiny_model_dir, lora, settings, words):
    with pytest.raises(ValueError, match=words):
        build_grpo(str(tiny_model_dir), lora=lora, **settings)


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_window_is_sampled_by_the_policy_of_so_many_windows_before(build, make_items, fit, stub, staleness):
    """The trainer finds the server's log-probabilities again with the weights of that time, and with no others."""
    module, recorder = build(staleness, accumulate=2), Recorder()
    fit(module, make_items([1, 2, 1]), max_steps=5, callbacks=[recorder])
    lags = [metrics["grpo/staleness"] for metrics in recorder.metrics]
    assert lags == [min(window, staleness) for window in range(5)]
    policies = [record["policy"] for record in recorder.records]
    assert policies == [max(0, window - staleness) for window in range(5) for _ in range(4)]
    assert [record["update"] for record in recorder.records] == [window for window in range(5) for _ in range(4)]
    # At a learning rate of 1e-2 a policy that is an update older differs visibly.
    differences = [metrics["grpo/sampler_abs_log_ratio"] for metrics in recorder.metrics]
    assert differences[0] < 1e-4 and all(value > 1e-3 for value in differences[1:])
    assert not stub.adapters


def test_servers_sample_while_the_trainer_updates(build, make_items, fit, stub):
    """The answers to the second window wait for the first update to begin: without staleness nobody would go on."""
    module, updating = build(1), threading.Event()
    train_on = module.train_on

    def noting(by_batch):
        updating.set()
        wait_for(lambda: stub.asked > 2)  # the next window is sampled in the middle of this update
        train_on(by_batch)

    module.train_on = noting
    stub.before_answer = lambda: wait_for(lambda: stub.asked < 2 or updating.is_set())
    assert fit(module, make_items([1, 2]), max_steps=2).global_step == 2


def test_windows_that_are_not_needed_are_not_waited_for(build, make_items, fit, stub):
    """After the last update the engine is free for an evaluation at once, though the next window hangs."""
    items, module = make_items([1, 2]), build(1)
    seen = []

    class Ask(Callback):
        def on_train_end(self, trainer, module):
            request = RolloutRequest.for_evaluation(items, 4, 2)
            stub.before_answer = lambda: None
            seen.append(module.engine.generate(request))

    release = threading.Event()
    # two windows of two prompts are trained on; the third is ahead
    stub.before_answer = lambda: None if stub.asked < 4 else release.wait(60)
    try:
        assert fit(module, items, max_steps=2, callbacks=[Ask()]).global_step == 2
    finally:
        release.set()
    assert len(seen[0]) == 2


def test_no_window_is_lost_or_trained_on_twice_at_the_end_of_the_data(build, make_items, fit):
    """Seven batches in windows of two: all four windows are trained on, though two are ahead at the last batch."""
    module, trained = build(2, accumulate=2), []
    learn_from = module.learn_from
    module.learn_from = lambda window: trained.append((window.first, len(window.batches))) or learn_from(window)
    trainer = fit(module, make_items([1, 2, 1]), num_items=1, max_epochs=1, limit_train_batches=7)
    assert trained == [(0, 2), (2, 2), (4, 2), (6, 1)] and trainer.global_step == 4
    assert not module.window_is_open and module._num_batches_committed == 7


@pytest.mark.parametrize("staleness", [1, 2])
def test_an_idle_window_leaves_the_adapter_as_it_is(build, make_items, fit, stub, monkeypatch, staleness):
    """Every second window is idle. The next ones are sampled by the policy of the updates that were made."""
    items, recorder = make_items([1, 2, 1, 1]), Recorder()
    idle = {id(item.image_sizes) for item in items[2:]}

    def score(text, answer, image_sizes):
        return flat_reward(0.9) if id(image_sizes) in idle else letters(text)

    use_reward(monkeypatch, score)
    trainer = fit(build(staleness), items, max_steps=4, callbacks=[recorder])
    assert trainer.global_step == 4
    updates = [0, 1, 1, 2, 2, 3, 3]  # made before each window was trained on
    policies = [updates[max(0, window - staleness)] for window in range(7)]
    found = [(record["update"], record["policy"]) for record in recorder.records]
    assert found == [pair for pair in zip(updates, policies, strict=True) for _ in range(2)]
    for window in range(0, 7, 2):  # at a learning rate of 1e-2 a policy that is an update older differs visibly
        is_current = updates[window] == policies[window]
        assert (recorder.metrics[window]["grpo/sampler_abs_log_ratio"] < 1e-4) == is_current
    assert 1 + policies[-1] <= len(stub.loads) == len(set(stub.loads)) <= 4, "one at the start, one for each update"


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("stopped_after", [1, 4, 6, 7])
def test_resume_equals_a_run_left_alone(build, make_items, fit, tmp_path, staleness, stopped_after):
    """Also inside a window, and before the first one was trained on: same texts, policies and weights."""

    class Killed(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx + 1 == stopped_after:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    items, settings = make_items([1, 2, 1, 1, 2]), {"staleness": staleness, "accumulate": 2}
    whole, resumed = Recorder(), Recorder()
    module, again = build(**settings), build(**settings)
    fit(module, items, max_steps=5, callbacks=[whole])
    fit(build(**settings), items, max_steps=5, callbacks=[Killed()])
    trainer = fit(again, items, max_steps=5, callbacks=[resumed], ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == 5
    assert resumed.records == whole.records[-len(resumed.records) :] and resumed.records
    assert equal_weights(module, again)


def test_a_run_that_lost_its_servers_goes_on_as_if_it_had_not(build, make_items, fit, stub, tmp_path):
    items = make_items([1, 2, 1])
    whole, lost, again = build(1), build(1), build(1)
    fit(whole, items, max_steps=4)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.num_batches == 3:
                module.engine._pool.patience = 0.2
                stub.stop()

    with pytest.raises(ServersLost):
        fit(lost, items, max_steps=4, callbacks=[Stop(), SaveOnInterrupt()])
    stub.start()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert fit(again, items, max_steps=4, ckpt_path=checkpoint).global_step == 4
    assert equal_weights(whole, again)


def test_a_run_that_learns_nothing_is_saved_though_its_adapters_are_removed(
    build, make_items, fit, stub, monkeypatch, tmp_path
):
    """The checkpoint is written after the engine was closed. The same command goes on from it with those policies."""
    use_reward(monkeypatch, lambda *_: flat_reward(0.9))
    items, recorder, run = make_items([1, 2]), Recorder(), {"max_steps": 5, "enable_checkpointing": True}
    with pytest.raises(IdleTooLong):
        fit(build(1, max_idle_windows=2), items, callbacks=[WindowCheckpoint()], **run)
    assert not stub.adapters
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = build(1, max_idle_windows=3)
    with pytest.raises(IdleTooLong):
        fit(again, items, callbacks=[recorder, WindowCheckpoint()], ckpt_path=checkpoint, **run)
    assert [record["policy"] for record in recorder.records] == [0, 0]
    assert {record["batch"] for record in recorder.records} == {2}


def test_a_server_that_is_started_again_gets_the_adapter_of_the_window_that_it_samples(build, make_items, fit, stub):
    items = make_items([1, 2, 1])
    whole, restarted = build(1), build(1)
    fit(whole, items, max_steps=4)

    class Restart(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.num_batches == 3:
                with stub.lock:  # not in the middle of an answer
                    stub.stop()
                    stub.start()

    assert fit(restarted, items, max_steps=4, callbacks=[Restart()]).global_step == 4
    assert equal_weights(whole, restarted)


def test_ranks_load_an_adapter_once(stub, tiny_model_dir, lora, make_items, fit, monkeypatch):
    """Both sample each window with the adapter of the same update."""
    use_reward(monkeypatch, letters)
    items = make_items([1, 2, 1, 1])

    def work():
        torch.set_num_threads(1)
        module, recorder = served(tiny_model_dir, lora, stub.url, staleness=1), Recorder()
        ranks = {"strategy": "ddp", "devices": 2}
        steps = fit(module, items, num_items=1, max_steps=4, callbacks=[recorder], **ranks).global_step
        weights = {name: value.numpy() for name, value in trained_weights(module.policy).items()}
        return steps, [record["policy"] for record in recorder.records], weights

    first, second = run_ranks(2, work)
    assert first[0] == second[0] == 4 and first[1] == second[1] == [0, 0, 1, 2]
    assert all((first[2][name] == second[2][name]).all() for name in first[2])
    assert len(stub.loads) == len(set(stub.loads)) and not stub.adapters
