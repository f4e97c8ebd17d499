"""This project as a contender of the benchmark: unchanged GRPO and CoTSFT in a minimal Lightning loop.

It uses only public names: `GRPO`, `CoTSFT`, their policy and engine. The driver (`experiments.bench.run`) runs it.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.checkpoints.pretrained import load_config
from datamodules.encoding.encoder import Batch, EncodedSample, Encoder
from datamodules.persistence.files import fingerprint
from datamodules.streaming.prefetch import prefetch
from experiments.bench.shapes import tokens_never_sampled
from experiments.bench.turns import MAX_STEPS, Gate, serve, synchronize
from experiments.bench.workload import Workload, make_samples
from lightning_modules.cot_sft import CoTSFT
from lightning_modules.grpo import GRPO
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.policy_module import PolicyModule
from lightning_modules.rl.grpo_settings import RolloutSettings, UpdateSettings
from lightning_modules.rl.loss_settings import LossSettings
from lightning_modules.rl.rollout_batch import PromptGroup
from lightning_modules.rollouts.base import Rollout, RolloutEngine, RolloutRequest, SamplingSettings


def build_module(model: str, workload: Workload) -> PolicyModule:
    """The LightningModule of a workload."""
    common = {
        "lora": LoraSettings(workload.lora_rank, workload.alpha),
        "dtype": workload.dtype,
        "gradient_checkpointing": workload.gradient_checkpointing,
        "activation_gib": workload.activation_gib,
        "learning_rate": 1e-6,
        "max_tokens_per_row": workload.max_tokens_per_row,
        "seed": workload.seed,
    }
    if workload.task == "sft":
        return CoTSFT(model, **common)
    samples_only = workload.task == "rollout"
    sampling = (workload.group_size, workload.temperature, workload.completion_tokens, workload.prompts_per_batch)
    return (RowsByBatch if workload.rows_by_batch else GRPO)(
        model,
        rollout=RolloutSettings(*sampling),
        loss=LossSettings(kl_beta=workload.beta),
        # All rewards of a random model are 0, and TRL trains on such groups too.
        update=UpdateSettings(skip_zero_advantage=samples_only, max_idle_windows=None),
        rewards=[{"class_path": "experiments.bench.workload.no_reward"}] if samples_only else None,
        accumulate=workload.accumulate,
        **common,
    )


class RowsByBatch(GRPO):
    """GRPO that trains on the batches of a window one after the other, each in rows of its own."""

    def train_on(self, by_batch: list[list[PromptGroup]]) -> None:
        for groups in by_batch:
            self.add_gradient(groups)
        self.update()


class EndlessBatches:
    """An endless loader that encodes the prompts of each step, in `accumulate` batches.

    With a GPU, it encodes while the previous step runs, like the datamodule in training. On a CPU, it encodes inside
    the step, like TRL, because there is no core to spare.
    """

    def __init__(self, model: str, workload: Workload, gate: Gate) -> None:
        # Written answers have different lengths, and none may be too long.
        limit = 4 * workload.completion_tokens + 512
        with_target = workload.task == "sft"
        self.encoder = Encoder(model, "absolute_pixels", "think", 1 << 17, limit, with_target)
        self.samples = make_samples(workload)
        self.size, self.gate = workload.prompts // workload.accumulate, gate

    def __iter__(self) -> Iterator[Batch]:
        batches = prefetch(self._encoded(), num_ahead=1) if torch.cuda.is_available() else self._encoded()
        while True:
            with self.gate.clock.phase("data"):
                batch = next(batches)
            yield batch

    def _encoded(self) -> Iterator[Batch]:
        """Yields batches; after the last sample it starts again with the first."""
        stream = itertools.cycle(self.samples)
        while True:
            yield Batch([self.encoder.encode(sample) for sample in itertools.islice(stream, self.size)])


class Turnstile(Callback):
    """Waits at the gate after every accumulation window, which is one optimizer step."""

    def __init__(self, model: str, workload: Workload, gate: Gate) -> None:
        self.model, self.workload, self.gate = model, workload, gate
        self.items: list[EncodedSample] = []  # of the present step
        self.is_new = True  # whether the next batch begins a step

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Forbid the tokens that would end a completion, and measure the phases."""
        policy = module.policy
        forced = tokens_never_sampled(self.model)
        missing = set(policy.banned_token_ids) - set(forced)
        if missing:
            raise ValueError(f"tokens that the policy bans but the benchmark does not: {sorted(missing)[:5]}")
        policy.banned = torch.tensor(forced, device=policy.device)
        # The phases of a step and their methods.
        clock = self.gate.clock
        clock.wrap(policy, "encode_images", "encode")
        clock.wrap(policy, "token_log_probs", _scoring_phase)
        clock.wrap(module, "manual_backward", "backward")
        clock.wrap(module, "update", "optimizer")
        if self.workload.task != "sft":
            if self.workload.mean_tokens is not None:
                policy.eos_ids = _random_ends(self.model, self.workload.mean_tokens)
            clock.wrap(module.engine, "generate", "rollout")
            _count_tokens(module.engine, self.gate, self.workload)
            self.gate.answers["decode"] = lambda: self._time_decoding(module)
        trainer.should_stop = not self.gate.open()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Report the step at its end. The hash of its tokens shows that the other contender reads the same."""
        self.items = [*([] if self.is_new else self.items), *batch.items]
        self.is_new = not module.window_is_open
        if not self.is_new:
            return
        gate, metrics, items = self.gate, trainer.callback_metrics, self.items
        gate.facts["prompt_tokens"] = sum(len(item.input_ids) for item in items)
        gate.facts["patches"] = sum(len(item.pixel_values) for item in items)
        if self.workload.task == "sft":
            gate.facts["completion_tokens"] = int(metrics["train/tokens"])
            gate.facts["loss"] = float(metrics["train/loss"])
            gate.facts["inputs"] = _digest([torch.cat([item.input_ids, item.completion_ids]) for item in items])
        else:
            gate.facts["inputs"] = _digest([item.input_ids for item in items])
        trainer.should_stop = not gate.step_done()

    def _time_decoding(self, module: GRPO) -> dict[str, Any]:
        """The seconds to decode a token, from rollouts of full and of quarter length with the same prefill."""
        longest = self.workload.completion_tokens
        shortest = max(1, longest // 4)
        best: dict[int, float] = {}
        with torch.no_grad():
            features = module.policy.encode_images(self.items)
        for length in (longest, shortest) * 2:  # the first pass warms up
            sampling = SamplingSettings(self.workload.group_size, self.workload.temperature, length)
            generator = torch.Generator(module.device).manual_seed(0)
            request = RolloutRequest(self.items, sampling, features, generator=generator)
            synchronize()
            began = time.perf_counter()
            module.engine.generate(request)
            synchronize()
            best[length] = min(best.get(length, float("inf")), time.perf_counter() - began)
        # The prefill cancels out in the difference. A completion of n tokens has n - 1 decoding steps.
        a_token = (best[longest] - best[shortest]) / (longest - shortest) if longest > shortest else float("nan")
        return {"seconds_a_token": a_token, "prefill_seconds": best[longest] - (longest - 1) * a_token}


def _random_ends(model: str, mean_tokens: int) -> tuple[int, ...]:
    """End tokens with which equally likely tokens make completions of this mean length: one of `mean_tokens` tokens."""
    vocabulary, never = load_config(model).text_config.vocab_size, set(tokens_never_sampled(model))
    sampled = [token for token in range(vocabulary) if token not in never]
    return tuple(sampled[: max(1, round(len(sampled) / mean_tokens))])


def _count_tokens(engine: RolloutEngine, gate: Gate, workload: Workload) -> None:
    """Let the engine count its tokens. It raises ValueError for completions that do not have the stated length."""
    generate = engine.generate

    def counted(request: RolloutRequest) -> list[list[Rollout]]:
        rollouts = generate(request)
        lengths = [len(rollout.token_ids) for group in rollouts for rollout in group]
        if workload.mean_tokens is None and set(lengths) != {request.sampling.max_new_tokens}:
            raise ValueError(f"completions have lengths {sorted(set(lengths))}, not {request.sampling.max_new_tokens}")
        gate.facts["completion_tokens"] = gate.facts.get("completion_tokens", 0) + sum(lengths)
        return rollouts

    engine.generate = counted


def _scoring_phase(*args: Any, reference: bool = False, **kwargs: Any) -> str:
    """The phase of a call of `token_log_probs`, by its arguments."""
    return "reference" if reference else "forward"


def _digest(sequences: Sequence[Tensor]) -> str:
    """A hash of token sequences, in any order."""
    return fingerprint(sorted(sequence.tolist() for sequence in sequences))


def train(command: dict[str, Any], gate: Gate) -> None:
    """Run the training loop of a workload; the gate stops it after every step."""
    model, workload = command["model"], Workload.from_json(command["workload"])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_steps=MAX_STEPS,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Turnstile(model, workload, gate)],
        )
        trainer.fit(build_module(model, workload), EndlessBatches(model, workload, gate))


if __name__ == "__main__":
    serve(train)
