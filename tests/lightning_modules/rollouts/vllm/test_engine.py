"""The served engine against a stub with a real tiny model behind it (`tests/vllm_stub.py`).

Faults are in `test_served_faults.py`, the real server in `test_vllm_server.py`.
"""

from __future__ import annotations

import json
import random
import re
import threading
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.save_on_interrupt import SaveOnInterrupt
from datamodules.persistence.problems import collect_problems
from datamodules.samples.sample import ImagePart, LoadedSample, TextPart
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.rollouts.vllm.prompts import PromptWriter
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings
from lightning_modules.rollouts.vllm.server_pool import ServersLost
from tests.conftest import random_png
from tests.lightning_modules.conftest import served, trained_weights
from tests.lightning_modules.grpo_modules import build_grpo, letters, use_reward
from tests.vllm_stub import wait_for

SAMPLING = SamplingSettings(group_size=3, temperature=0.8, max_new_tokens=6)


def stir(policy: QwenVL, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def largest_difference(policy: QwenVL, items, groups) -> float:
    """Between the engine's log-probabilities and the trainer's."""
    features = policy.encode_images(items)
    found = []
    for rows in pack_rows(items, [[r.token_ids for r in group] for group in groups], 10_000):
        own = policy.token_log_probs(rows, features, SAMPLING.temperature)
        theirs = torch.cat([r.log_probs for group in groups for r in group])
        found.append((own - theirs).abs().max().item())
    return max(found)


def test_rollouts_are_the_policys_own(stub, connect, make_items) -> None:
    """Prompts of several images of mixed sizes; the trainer finds the log-probabilities that the server gave."""
    engine, items = connect(stub.url), make_items([1, 3, 2])
    engine.check({"training": 500})
    plain = engine.generate(RolloutRequest(items, SAMPLING, generator=torch.Generator().manual_seed(0)))
    assert largest_difference(engine.policy, items, plain) < 1e-4, "before any sync the model as it is"
    stir(engine.policy)
    assert largest_difference(engine.policy, items, plain) > 1e-3
    engine.sync()
    groups = engine.generate(RolloutRequest(items, SAMPLING, generator=torch.Generator().manual_seed(0)))
    assert largest_difference(engine.policy, items, groups) < 1e-4
    assert [len(group) for group in groups] == [3, 3, 3]
    ends = set(engine.policy.eos_ids)
    assert all(r.finished == (r.token_ids[-1].item() in ends) for group in groups for r in group)
    assert all(r.finished or len(r.token_ids) == SAMPLING.max_new_tokens for group in groups for r in group)
    again = engine.generate(RolloutRequest(items, SAMPLING, generator=torch.Generator().manual_seed(0)))
    assert [[r.text for r in group] for group in again] == [[r.text for r in group] for group in groups]
    assert len({r.text for group in groups for r in group}) > 3


def test_greedy_answers_of_a_server_are_the_native_engines(stub, connect, make_items) -> None:
    """With the same tokens banned: placeholders alone."""
    engine, items = connect(stub.url), make_items([1, 3, 2])
    engine.check({"training": 500})
    request = RolloutRequest.for_evaluation(items, 8, 3)
    ours = NativeEngine(engine.policy).generate(request)
    theirs = engine.generate(request)
    assert [group[0].token_ids.tolist() for group in ours] == [group[0].token_ids.tolist() for group in theirs]


def test_every_sync_has_a_new_name_and_the_old_one_goes(stub, connect, tmp_path) -> None:
    engine, names = connect(stub.url), []
    (tmp_path / "adapters" / "of-a-killed-run").mkdir(parents=True)
    for _ in range(3):
        engine.sync()
        names.append(engine.adapter.name)
        assert list(stub.adapters) == [engine.adapter.name]
        assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == [engine.adapter.name]
    assert stub.loads == names and len(set(names)) == 3
    engine.close()
    assert not stub.adapters and not list((tmp_path / "adapters").iterdir())
    another = connect(stub.url)
    another.sync()
    assert another.adapter.name not in names, "nor does another process use a name again"


def test_a_folder_that_others_may_use_is_left_alone(stub, connect, tmp_path) -> None:
    """And an end without a server is an end: what was trained is there."""
    (tmp_path / "shared" / "of-another-run").mkdir(parents=True)
    engine = connect(stub.url, adapters=str(tmp_path / "shared"))
    engine.sync()
    assert len(list((tmp_path / "shared").iterdir())) == 2
    stub.stop()
    engine.close()
    assert [folder.name for folder in (tmp_path / "shared").iterdir()] == ["of-another-run"]
    stub.start()


def test_a_restarted_server_is_given_the_adapter_again(stub, connect, make_items) -> None:
    engine, items = connect(stub.url), make_items([1, 2])
    stir(engine.policy)
    engine.sync()
    stub.stop()
    threading.Timer(0.3, stub.start).start()
    groups = engine.generate(RolloutRequest(items, SAMPLING))
    assert stub.loads == [engine.adapter.name] * 2
    assert largest_difference(engine.policy, items, groups) < 1e-4

    stub.before_answer = lambda: stub.adapters.clear() if len(stub.loads) == 2 else None  # in the middle of a batch
    groups = engine.generate(RolloutRequest(items, SAMPLING))
    assert stub.loads == [engine.adapter.name] * 3
    assert largest_difference(engine.policy, items, groups) < 1e-4


def test_a_dead_servers_prompts_go_to_the_others_and_it_comes_back(stub, other, connect, make_items) -> None:
    engine, items = connect(stub.url, other.url, concurrency=1), make_items([1] * 6)
    stir(engine.policy)
    engine.sync()
    assert stub.loads == other.loads == [engine.adapter.name]
    engine.generate(RolloutRequest(items, SAMPLING))
    assert stub.asked + other.asked == 6 and min(stub.asked, other.asked) > 0

    other.stop()
    asked = stub.asked
    groups = engine.generate(RolloutRequest(items, SAMPLING))
    assert stub.asked == asked + 6 and largest_difference(engine.policy, items, groups) < 1e-4
    stir(engine.policy, seed=4)
    engine.sync()  # one of two is enough

    asked = other.asked

    def come_back() -> None:  # the first answer waits until the other server is there and has been asked
        if other.asked == asked and len(other.loads) == 1:
            other.start()
        wait_for(lambda: other.asked > asked)

    stub.before_answer = come_back
    groups = engine.generate(RolloutRequest(items, SAMPLING))
    assert other.loads[-1] == engine.adapter.name and other.asked > asked
    assert largest_difference(engine.policy, items, groups) < 1e-4


def test_a_prompt_that_is_no_single_turn_is_refused(tiny_model_dir, make_items) -> None:
    (item,) = make_items([1])
    writer = PromptWriter(str(tiny_model_dir))
    assert [part["type"] for part in writer.messages(item)[0]["content"]] == ["image_url", "text"]
    with pytest.raises(ValueError, match=r"'sample/0': its prompt is no turn with 1 images"):
        writer.messages(replace(item, input_ids=item.input_ids[:-2]))


@pytest.mark.parametrize(
    "text",
    [
        "Wo ist der größte Schneemann \N{SNOWMAN}?",
        "e\u0301 is not é, nor \N{HANGUL SYLLABLE HAN} \u1112\u1161\u11ab",
        "\N{FAMILY}\u200d\N{GRINNING FACE} \U0001f1e9\U0001f1ea\ufeff",
        "  blanks,\n\n\tand lines \n",
        "{braces} <b>tags</b> &amp; user\n assistant\n",
        "",
    ],
)
def test_any_text_between_images_is_read_as_it_was_meant(stub, tiny_model_dir, make_items, text) -> None:
    (item,) = make_items([3])
    parts = (ImagePart(1), TextPart(text + "1"), ImagePart(0), ImagePart(2), TextPart(text + "2"))
    sample = replace(item.sample, messages=parts)
    rng = random.Random(0)
    images = tuple(random_png(rng, size) for size in ((112, 84), (84, 112), (56, 56)))
    item = stub.encoder.encode(LoadedSample(sample, images))
    read = stub._read(PromptWriter(str(tiny_model_dir)).messages(item))
    assert read.input_ids.tolist() == item.input_ids.tolist()
    assert torch.equal(read.grid_thw, item.grid_thw) and torch.allclose(read.pixel_values, item.pixel_values)


def test_settings_that_cannot_work_are_named() -> None:
    for wrong in ({"servers": ()}, {"servers": ("http://a", "http://a")}, {"patience": 0}, {"attempts": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VLLMSettings(**wrong)
    with collect_problems() as faults:
        build_grpo("no/such", engine="vllm", importance_cap=0)
    assert re.match(r"update\.importance_cap=0 must.*rollout\.engine='vllm' with lora=None", "; ".join(faults))


# Training


class Recorder(Callback):
    def __init__(self):
        self.names, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.names.append(module.engine.adapter.name)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("updates", [{}, {"epochs_per_rollout": 2}])
def test_grpo_trains_on_what_the_server_samples(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, updates
) -> None:
    """Behind each update the server has the new weights, so the trainer finds its log-probabilities again."""
    use_reward(monkeypatch, letters)
    recorder = Recorder()
    module = served(tiny_model_dir, lora, stub.url, accumulate=2, **updates)
    trainer = fit(module, make_items([1, 2, 1]), max_steps=4, callbacks=[recorder])
    assert trainer.global_step == 4
    windows = 4 // module.updates_per_window
    assert len(stub.loads) == len(set(stub.loads)) == windows + 1, "at the start, and behind each window"
    of_batches = [name for name in stub.loads for _ in range(2)][1:]  # as seen behind each batch
    assert recorder.names == of_batches[: len(recorder.names)]
    seen = [
        metrics["grpo/sampler_abs_log_ratio"] for metrics in recorder.metrics if "grpo/sampler_abs_log_ratio" in metrics
    ]
    assert seen and all(0 <= value < 1e-4 for value in seen)
    assert all(metrics.get("grpo/frac_capped", 0) == 0 for metrics in recorder.metrics)
    assert not stub.adapters, "they are gone at the end"


def test_ranks_share_one_adapter(stub, tiny_model_dir, lora, make_items, fit, monkeypatch, tmp_path) -> None:
    """Rank 0 loads it; both ask for it by its name, and rank 1 sees that it is there."""
    use_reward(monkeypatch, letters)
    paths: list[str] = []
    stub.wrap = lambda path, answer: (paths.append(path), answer())[1]

    class Write(Callback):
        def __init__(self):
            self.names = []

        def on_train_batch_end(self, trainer, module, *_):
            self.names.append(module.engine.adapter.name)

        def on_train_end(self, trainer, module):
            (tmp_path / f"names-{trainer.global_rank}.json").write_text(json.dumps(self.names))

    module = served(tiny_model_dir, lora, stub.url)
    fit(module, make_items([1, 2]), num_items=1, max_steps=2, strategy="ddp_fork", devices=2, callbacks=[Write()])
    first, second = (json.loads((tmp_path / f"names-{rank}.json").read_text()) for rank in range(2))
    assert first == second == stub.loads[1:] and len(first) == 2
    # Each rank checks once, with a folder that is not there, whether the server loads adapters at all.
    assert paths.count("load_lora_adapter") == len(stub.loads) + 2
    assert not stub.adapters


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_lost_its_servers_goes_on_as_if_it_had_not(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, tmp_path, accumulate
) -> None:
    use_reward(monkeypatch, letters)
    items = make_items([1, 2, 1])
    whole = served(tiny_model_dir, lora, stub.url, accumulate=accumulate)
    fit(whole, items, max_steps=3)

    lost = served(tiny_model_dir, lora, stub.url, accumulate=accumulate)
    impatient = replace(lost.rollout_settings.vllm, patience=0.2)
    lost.rollout_settings = replace(lost.rollout_settings, vllm=impatient)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.num_batches == 2 * accumulate - 1 + (accumulate == 1):
                stub.stop()

    with pytest.raises(ServersLost):
        fit(lost, items, max_steps=3, callbacks=[Stop(), SaveOnInterrupt()])
    stub.start()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = served(tiny_model_dir, lora, stub.url, accumulate=accumulate)
    trainer = fit(again, items, max_steps=3, ckpt_path=checkpoint)
    assert trainer.global_step == 3 and again.num_batches == 3 * accumulate
    ours, theirs = trained_weights(whole.policy), trained_weights(again.policy)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
