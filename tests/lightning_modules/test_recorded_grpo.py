"""GRPO computes what it computed when `recorded_grpo.json` was written, down to the last bit on the same kind of CPU.

Each case trains a few updates of the tiny model and notes, in order, what happens: sampled tokens and their
log-probabilities, losses, gradients, logged metrics, and the final weights. Bits depend on the CPU's instructions and
on the versions of PyTorch and transformers, which choose the kernels. Where all three are those of the recording, every
bit must be equal. Elsewhere the comparison ends with the first gradient, to `TOLERANCE`: Adam divides by the size of
a gradient, so that the rounding of a tiny one moves a weight as far as a large one does, and later tokens may differ.

To record again, when numbers are meant to change:
RECORD_GRPO=1 python -m pytest tests/lightning_modules/test_recorded_grpo.py
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Callback

from datamodules.samples.answer_text import render_answer
from lightning_modules.grpo import GRPO
from tests.lightning_modules.grpo_modules import build_grpo

RECORD = Path(__file__).with_name("recorded_grpo.json")
TOLERANCE = 1e-3  # relative
SEVERAL = {"epochs_per_rollout": 2, "minibatches": 2, "accumulate": 2}
SMALL_ROWS = {"max_tokens_per_row": 10}  # every group in a row of its own

CASES = {
    "completion_mean": {"accumulate": 2, "kl_beta": 0.05, "reduction": "completion"},
    "token_mean": {"accumulate": 2, "kl_beta": 0.05, "reduction": "token", **SMALL_ROWS},
    "dr_grpo": {"accumulate": 2, "kl_beta": 0.05, "reduction": "dr_grpo"},
    "without_kl_or_clip": {"kl_beta": 0.0, "clip": None, "temperature": 0.7},
    "importance": {"kl_beta": 0.0, "importance_cap": 1.1},
    "masked": {"kl_beta": 0.05, "mask_truncated": True},
    "zero_advantage_trained": {"kl_beta": 0.05, "skip_zero_advantage": False},
    "weights": {"kl_beta": 0.001, "accuracy_weight": 2.0, "format_weight": 0.25},
    "vision": {"kl_beta": 0.05, "freeze_vision": False, "learning_rate": 1e-4},
    "several_updates": {"kl_beta": 0.05, **SEVERAL},
    "several_updates_without_kl": {"kl_beta": 0.0, **SEVERAL, **SMALL_ROWS},
    "several_updates_by_sampler": {"kl_beta": 0.05, "old_log_probs": "engine", **SEVERAL},
    "several_updates_by_sampler_without_kl": {"kl_beta": 0.0, "old_log_probs": "engine", **SEVERAL},
    "several_updates_importance": {"kl_beta": 0.05, "importance_cap": 1.1, "reduction": "token", **SEVERAL},
    "several_updates_masked": {"kl_beta": 0.05, "mask_truncated": True, **SEVERAL},
    "several_updates_zero_advantage": {
        "kl_beta": 0.05,
        "skip_zero_advantage": False,
        "reduction": "dr_grpo",
        **SEVERAL,
    },
}
# Logged name -> name in the record.
METRICS = {
    "reward/total": "reward",
    "reward/accuracy": "accuracy",
    "reward/format": "format",
    "grpo/completion_length": "length",
    "grpo/frac_truncated": "truncated",
    "grpo/entropy": "entropy",
    "grpo/frac_zero_advantage": "zero_advantage",
    "grpo/loss": "loss",
    "grpo/kl": "kl",
    "grpo/clip_fraction": "clipped",
    "grpo/sampler_abs_log_ratio": "abs_log_ratio",
    "grpo/frac_capped": "capped",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
}


def build(model: str, lora, **case) -> GRPO:
    """The module of one case; the only lines that know how settings are given."""
    clip = case.pop("clip", 0.2)
    weights = {term: case.pop(f"{term}_weight") for term in ("accuracy", "format") if f"{term}_weight" in case}
    if case.get("old_log_probs") == "engine":
        case["old_log_probs"] = "sampler"
    fixed = {"lora": lora, "group_size": 4, "max_new_tokens": 12, "clip_low": clip, "clip_high": clip}
    usual = {"temperature": 1.0, "learning_rate": 1e-2, "max_grad_norm": 1.0, "weight_decay": 0.1}
    return build_grpo(model, reward_weights=weights, **fixed, **usual | case)


class Altered:
    """An engine whose texts are answers, read from the sampled ids, and whose log-probabilities are a little off, as a
    server's are. The first group of every third batch has equal rewards.

    Numbers were recorded when each batch was sampled alone, and are noted so.
    """

    def __init__(self, engine, note, module) -> None:
        self.engine, self.note, self.module, self.num_batches = engine, note, module, 0

    def generate(self, request):
        groups, altered = self.engine.generate(request), []
        for batch in self.module._batches:
            altered += self._batch(groups[: len(batch.items)])
            groups = groups[len(batch.items) :]
        return altered

    def _batch(self, groups):
        is_equal = self.num_batches % 3 == 0
        self.num_batches += 1
        groups = [
            [self._alter(rollout, is_equal and index == 0) for rollout in group] for index, group in enumerate(groups)
        ]
        rollouts = [rollout for group in groups for rollout in group]
        self.note(
            "rollouts",
            {
                "tokens": [rollout.token_ids.tolist() for rollout in rollouts],
                "finished": [int(rollout.finished) for rollout in rollouts],
                "log_probs": summary([rollout.log_probs for rollout in rollouts]),
            },
        )
        return groups

    def _alter(self, rollout, is_equal):
        first, last = (0, 0) if is_equal else (rollout.token_ids[0].item(), rollout.token_ids[-1].item())
        box = [first % 30, last % 20, first % 30 + 50, last % 20 + 40]
        text = render_answer(box, "ring", None if first % 3 == 1 else "It is there.")
        return replace(rollout, text=text, log_probs=rollout.log_probs + 0.15 * torch.sin(rollout.token_ids.float()))

    def sync(self):
        self.engine.sync()

    def close(self):
        self.engine.close()


class Recorder(Callback):
    def __init__(self, note) -> None:
        self.note = note

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.note("gradient", summary([parameter.grad for parameter in module.policy.trainable_parameters()]))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        logged = sorted(trainer.callback_metrics.items())
        self.note("metrics", {METRICS[n]: float(v).hex() for n, v in logged if not n.startswith("speed/")})


def summary(tensors) -> dict[str, str]:
    """A digest of every bit, and two numbers to which the same tensors come near on any CPU."""
    digest, square, product = hashlib.sha256(), 0.0, 0.0
    for tensor in tensors:
        tensor = tensor.detach().contiguous()
        digest.update(tensor.numpy().tobytes())
        flat = tensor.double().flatten()
        square += float(flat @ flat)
        product += float(flat @ torch.cos(torch.arange(len(flat), dtype=torch.float64)))
    return {"digest": digest.hexdigest()[:16], "norm": (square**0.5).hex(), "product": product.hex()}


def run(case, tiny_model_dir, lora, make_items, fit) -> list[tuple[str, dict]]:
    """What happens, in order: (kind of event, its values)."""
    events = []
    note = lambda kind, values: events.append((kind, values))  # noqa: E731
    module = build(str(tiny_model_dir), lora, **case)
    module.configure_model()
    # Every twelfth token ends a completion, so that some are short and some are cut at the limit.
    module.policy.__dict__["eos_ids"] = (*module.policy.eos_ids, *range(0, 250, 12))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the start, where policy and reference are the same model
        for parameter in module.policy.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    module.engine = Altered(module.engine, note, module)
    backward_sum = module.backward_sum

    def noting(total, count):
        note("loss", {"total": total.item().hex(), "count": float(count).hex()})
        backward_sum(total, count)

    module.backward_sum = noting
    updates = case.get("epochs_per_rollout", 1) * case.get("minibatches", 1)
    steps = 3 if updates == 1 else 2 * updates
    fit(module, make_items([1, 2, 1, 3, 2]), max_steps=steps, callbacks=[Recorder(note)])
    note("weights", summary(module.policy.trainable_parameters()))
    return events


def as_record(events) -> dict:
    """Events up to the first gradient with all their values; of later ones the kind and a digest."""
    first = 1 + next(index for index, (kind, _) in enumerate(events) if kind == "gradient")
    later = [
        f"{kind} {hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]}"
        for kind, values in events[first:]
    ]
    return {"first": [[kind, values] for kind, values in events[:first]], "later": later}


def by_kind(record: dict) -> dict:
    """The same sorted by kind, without logged metrics and the engine's log-probabilities after the first update.

    All batches of a window are sampled together now, then trained on, and logged once; recorded were one batch after
    the other. So metrics are means over other completions, events of different kinds have another order, and products
    with more rows round the engine's log-probabilities otherwise. Losses before the first gradient are added up: groups
    of several batches share packed rows now.
    """
    first = sorted(
        (event for event in record["first"] if event[0] not in ("metrics", "loss")), key=lambda event: event[0]
    )
    losses = [values for kind, values in record["first"] if kind == "loss"]
    sums = {name: sum(float.fromhex(values[name]) for values in losses).hex() for name in ("total", "count")}
    first.append(["loss", sums])
    kept = (event for event in record["later"] if not event.startswith(("metrics", "rollouts")))
    later = sorted(kept, key=lambda event: event.split()[0])
    return {"first": first, "later": later}


def without_digest(record: dict) -> dict:
    """The same without the digest of the engine's log-probabilities."""
    first = [[kind, values | {"log_probs": None} if kind == "rollouts" else values] for kind, values in record["first"]]
    return record | {"first": first}


def platform() -> dict[str, str]:
    """What the kernels, and so the last bits, depend on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    wide = sorted(flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma", "f16c")))
    return {
        "cpu": " ".join([fields.get("vendor_id", ""), torch.backends.cpu.get_cpu_capability(), *wide]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_near(found: dict, recorded: dict) -> None:
    """Equal up to `TOLERANCE`. Text is a hexadecimal float, or a digest, which is left out."""
    assert found.keys() == recorded.keys()
    size = float.fromhex(recorded["norm"]) if "norm" in recorded else 1.0  # a product may cancel to almost 0
    for name in recorded.keys() - {"digest"}:
        if isinstance(recorded[name], dict):
            assert_near(found[name], recorded[name])
        elif isinstance(recorded[name], str):
            expected = pytest.approx(float.fromhex(recorded[name]), rel=TOLERANCE, abs=TOLERANCE * size)
            assert float.fromhex(found[name]) == expected, name
        else:
            assert found[name] == recorded[name], name


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_the_recorded_one(name, tiny_model_dir, lora, make_items, fit):
    events = run(dict(CASES[name]), tiny_model_dir, lora, make_items, fit)
    reached = {kind: [values for k, values in events if k == kind] for kind, _ in events}
    assert any(0 < sum(values["finished"]) < len(values["finished"]) for values in reached["rollouts"])
    assert any(float.fromhex(values.get("zero_advantage", "0x0p+0")) > 0 for values in reached["metrics"])
    several = "epochs_per_rollout" in CASES[name]
    assert several == any(float.fromhex(values.get("clipped", "0x0p+0")) > 0 for values in reached["metrics"])
    found = as_record(events)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {"cases": {}}
    if os.environ.get("RECORD_GRPO"):
        record = {"platform": platform(), "cases": record["cases"] | {name: json.loads(json.dumps(found))}}
        RECORD.write_text(json.dumps(record, separators=(",", ":")).replace('],["', '],\n["') + "\n")
    recorded = record["cases"][name]
    if "accumulate" in CASES[name]:
        found, recorded = by_kind(found), by_kind(recorded)
    assert [kind for kind, _ in found["first"]] == [kind for kind, _ in recorded["first"]]
    for (_, values), (_, expected) in zip(found["first"], recorded["first"], strict=True):
        assert_near(values, expected)
    if "accumulate" in CASES[name]:
        found, recorded = without_digest(found), without_digest(recorded)
        if CASES[name].get("old_log_probs") == "engine" or "importance_cap" in CASES[name]:
            return  # the engine's log-probabilities are part of the loss
        if not several:
            return  # sums in packed rows with the groups of several batches have another order
    if platform() == record["platform"]:
        assert found == recorded
