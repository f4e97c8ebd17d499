"""2 and 4 processes learn what one learns from the same samples, with DDP and with sharded weights (FSDP2)."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from callbacks.checkpoints import WholeCheckpoints
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rl.loss_settings import EntropySettings, ScheduleSettings
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.training.fsdp_strategy import ShardedStrategy
from tests.lightning_modules.conftest import LORA
from tests.lightning_modules.grpo_modules import build_grpo, flat_reward, letters, use_reward
from tests.lightning_modules.ranks import run_ranks

STRATEGIES = {"ddp": lambda: "ddp", "sharded": ShardedStrategy}
GLOBAL_BATCH = 4


class Curve(Callback):
    """What is logged of every batch, or of every window, but for times."""

    def __init__(self):
        self.metrics, self.records = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.window_is_open and not module.logs_every_batch:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.metrics.append({name: value for name, value in logged.items() if not name.startswith("speed/")})
        self.records += [(record["id"], record["texts"]) for record in getattr(module, "last_rollouts", [])]


@pytest.fixture
def build(tiny_model_dir, monkeypatch):
    use_reward(monkeypatch, letters)

    def make(phase, **settings):
        shared = {"lora": LORA, "learning_rate": 1e-3, "weight_decay": 0.1, "max_tokens_per_row": 60} | settings
        if phase == "sft":
            return CoTSFT(str(tiny_model_dir), **shared)
        rollouts = {"group_size": 4, "temperature": 1.0, "max_new_tokens": 6, "kl_beta": 0.05}
        return build_grpo(str(tiny_model_dir), **rollouts | shared)

    return make


class Replay:
    """Keeps what the engine rolls out, by seed, and gives the same to who asks with that seed. Over many updates one
    token is once so near the border of two that rounding decides, and from there on two runs learn from other texts."""

    def __init__(self):
        self.known, self.engine = {}, None

    def generate(self, request):
        seeds = request.seeds
        if missing := [index for index, seed in enumerate(seeds) if seed not in self.known]:
            assert self.engine is not None, "a seed that one process does not have"
            chosen = {name: [getattr(request, name)[i] for i in missing] for name in ("items", "features", "seeds")}
            rollouts = self.engine.generate(replace(request, **chosen))
            self.known |= {seeds[index]: group for index, group in zip(missing, rollouts, strict=True)}
        return [self.known[seed] for seed in seeds]

    def sync(self):
        """Its engine decodes with the policy itself."""

    close = sync


@pytest.fixture
def curve(build, make_items, fit):
    """curve(phase, strategy, world_size, steps, **settings): what each rank logs, and what it rolled out."""

    def run(phase, strategy, world_size, steps, replay=None, **settings):
        items = make_items([1, 2, 1, 3, 2, 1, 1, 2, 1, 1, 3, 1], with_target=phase == "sft")

        def work():
            torch.set_num_threads(1)
            recorder = Curve()
            ranks = {"strategy": STRATEGIES[strategy](), "devices": world_size} if world_size > 1 else {}
            module = build(phase, **settings)
            module.configure_model()
            if replay is not None and phase == "grpo":
                replay.engine = module.engine if world_size == 1 else None
                module.engine = replay
            fit(module, items, GLOBAL_BATCH // world_size, max_steps=steps, callbacks=[recorder], **ranks)
            return recorder.metrics, recorder.records

        return run_ranks(world_size, work) if world_size > 1 else [work()]

    return run


def assert_same_curves(one, many):
    (metrics, records), *_ = one
    for rank, _ in many:
        assert len(rank) == len(metrics)
        for step, (ours, theirs) in enumerate(zip(rank, metrics, strict=True)):
            assert ours == pytest.approx(theirs, abs=1e-4), f"update {step}"
    together = sorted(record for _, records in many for record in records)
    assert together == sorted(records)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_two_processes_log_what_one_logs(curve, phase, strategy):
    assert_same_curves(curve(phase, strategy, 1, 3), curve(phase, strategy, 2, 3))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_two_processes_have_one_objective(curve, kl_in, strategy):
    """The reference is a copy of its own: where it is sharded, each of its passes waits for the other rank."""
    settings = {
        "kl_in": kl_in,
        "kl_beta": 0.3,
        "kl_schedule": ScheduleSettings("linear", final=0.0, updates=2),  # in the third update it makes no pass
        "entropy": EntropySettings(0.1, target=100.0, step=0.1),
        "normalise_over": "all",
        "lora": None,
        "learning_rate": 1e-4,
    }
    one, two = (curve("grpo", strategy, size, 3, **settings) for size in (1, 2))
    assert_same_curves(one, two)
    assert [m["grpo/kl_beta"] for m in two[0][0]] == pytest.approx([0.3, 0.15, 0.0])
    assert ("grpo/kl_penalty" in two[0][0][0]) == (kl_in == "reward")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("phase", "settings"),
    [
        ("sft", {}),
        ("sft", {"lora": None, "freeze_vision": False, "gradient_checkpointing": True}),
        ("grpo", {}),
        ("grpo", {"lora": None, "learning_rate": 1e-4, "gradient_checkpointing": True}),
        ("grpo", {"freeze_vision": False, "learning_rate": 1e-4}),
    ],
    ids=["sft-lora", "sft-full", "grpo-lora", "grpo-full", "grpo-vision"],
)
def test_twenty_updates_are_those_of_one_process(curve, phase, settings, strategy, world_size):
    replay = Replay()
    one, many = (curve(phase, strategy, size, 20, replay, **settings) for size in (1, world_size))
    assert len(one[0][0]) == 20
    assert_same_curves(one, many)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_without_anything_to_learn_from_takes_part(build, make_items, fit, monkeypatch, strategy):
    """Ranks with unlike numbers of images and rows, and one whose groups are all equal, in every update of several."""
    items = make_items([1, 3])

    def equal_on_rank_1(text, answer, image_sizes, *rest):
        return flat_reward(0.6) if image_sizes == items[1].image_sizes else letters(text)

    use_reward(monkeypatch, equal_on_rank_1)

    def work():
        torch.set_num_threads(1)
        module = build("grpo", epochs_per_rollout=2, minibatches=2, accumulate=2)
        passes, dummy_forward = [], module.dummy_forward
        module.dummy_forward = lambda: passes.append(1) or dummy_forward()
        trainer = fit(module, items, 1, max_steps=8, strategy=STRATEGIES[strategy](), devices=2)
        weights = {name: tensor.numpy() for name, tensor in module.policy.trained_tensors()}
        return trainer.global_step, len(passes), weights

    (steps, passes, first), (_, idle, second) = run_ranks(2, work)
    assert steps == 8 and passes == 0 and (idle > 0) == (strategy == "sharded")
    assert all((first[name] == second[name]).all() for name in first)
    assert any(value.any() for name, value in first.items() if "lora_B" in name)


def test_each_rank_holds_its_part_of_the_layers_and_their_optimizer_state(build, make_items, fit):
    def work():
        torch.set_num_threads(1)
        module = build("sft", lora=None)
        items = make_items([1, 1], with_target=True)
        trainer = fit(module, items, 1, max_steps=1, strategy=ShardedStrategy(), devices=2)
        layers = module.policy.base.model.language_model.layers
        own = sum(p.to_local().numel() for p in layers.parameters())
        state = trainer.optimizers[0].state
        moments = sum(state[p]["exp_avg"].to_local().numel() for p in layers.parameters())
        with pytest.raises(RuntimeError, match="sharded over ranks"):
            module.policy.decoder()
        return own, moments, sum(p.numel() for p in layers.parameters())

    parts = run_ranks(2, work)
    assert sum(own for own, _, _ in parts) == sum(moments for _, moments, _ in parts) == parts[0][2]
    assert all(0.4 < own / total < 0.6 for own, _, total in parts)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_checkpoint_and_merged_model_are_those_of_an_unsharded_run(build, make_items, fit, tmp_path, lora):
    """Written by two ranks with sharded layers; one process goes on from it, and two go on from one process's."""
    items = make_items([1, 2, 1, 3, 2, 1], with_target=True)

    class Leave(Callback):
        def __init__(self, folder):
            self.folder = folder

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(self.folder / "two.ckpt")

        def on_fit_end(self, trainer, module):
            module.policy.save_merged(self.folder / "merged", write=trainer.is_global_zero)
            trainer.strategy.barrier()

    def train(name, world_size, **more):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ranks = {"strategy": ShardedStrategy(), "devices": world_size} if world_size > 1 else {}
        module = build("sft", lora=lora, learning_rate=1e-3 if lora else 1e-4)
        own = {"callbacks": [Leave(folder)], "plugins": [WholeCheckpoints()]}
        fit(module, items, 2 // world_size, max_steps=4, **own, **ranks, **more)

    train("one", 1)
    run_ranks(2, functools.partial(train, "two", 2))
    run_ranks(2, functools.partial(train, "two_from_one", 2, ckpt_path=tmp_path / "one" / "two.ckpt"))
    train("one_from_two", 1, ckpt_path=tmp_path / "two" / "two.ckpt")

    saved = [torch.load(tmp_path / name / "two.ckpt", weights_only=True) for name in ("one", "two")]
    for checkpoint in saved:
        latest = checkpoint["policy_module"]["latest"]
        checkpoint["policy_module"]["latest"] = {k: v for k, v in latest.items() if not k.startswith("speed/")}
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "policy_module"):
        torch.testing.assert_close(saved[1][part], saved[0][part], atol=1e-5, rtol=1e-3)
    expected = load_file(tmp_path / "one" / "merged" / "model.safetensors")
    for name in ("two", "two_from_one", "one_from_two"):
        merged = load_file(tmp_path / name / "merged" / "model.safetensors")
        assert merged.keys() == expected.keys()
        torch.testing.assert_close(merged, expected, atol=2e-5, rtol=1e-3)


def test_memory_kept_from_before_the_policy_was_sharded_is_not_decoded_with(tiny_model_dir, make_items):
    request = RolloutRequest(make_items([1, 2]), SamplingSettings(2, 1.0, 6), seeds=[1, 2])

    def work():
        torch.set_num_threads(1)
        policy = QwenVL(str(tiny_model_dir), lora=LORA)
        engine = NativeEngine(policy, static=True)  # as on a GPU, where rejection sampling comes first

        def texts():
            groups = engine.generate(request)
            return [[rollout.token_ids.tolist() for rollout in group] for group in groups]

        before = texts()
        torch.distributed.init_process_group("gloo")
        policy.shard(init_device_mesh("cpu", (2,)))
        return before == texts(), engine._kept is None

    assert run_ranks(2, work) == [(True, True)] * 2
