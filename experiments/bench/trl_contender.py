"""TRL as a contender of the benchmark: its GRPOTrainer and SFTTrainer with transformers' generate.

The driver (`experiments.bench.run`) runs it with the Python of an environment that has TRL. Settings are TRL's own
defaults, except those that make it faster or that make both contenders do the same work: one forward pass takes the
whole step, nothing is logged or saved, and gradient checkpointing is on only where this project has it on too.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import trl
from datasets import Dataset, Image, List
from transformers import TrainerCallback, TrainerControl
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from datamodules.checkpoints.pretrained import load_processor
from datamodules.encoding.encoder import END_OF_TURN, EncodedSample, Encoder
from datamodules.encoding.messages import PromptStyle, build_messages, target_text
from datamodules.persistence.files import fingerprint
from datamodules.samples.boxes import BoxFormat
from experiments.bench.shapes import tokens_never_sampled
from experiments.bench.turns import MAX_STEPS, Gate, serve
from experiments.bench.workload import Workload, make_samples
from lightning_modules.models.architectures.qwen2_5_vl import Qwen25VL
from lightning_modules.models.layers.lora import LoraSettings, lora_config
from lightning_modules.rl.rewards.completion import Completion
from lightning_modules.rl.rewards.reward_list import RewardList

STYLE, BOX_FORMAT = PromptStyle.THINK, BoxFormat.ABSOLUTE_PIXELS


def make_dataset(model: str, workload: Workload) -> tuple[Dataset, list[EncodedSample]]:
    """The rows for TRL, and the same samples encoded by this project."""
    encoder = Encoder(model, BOX_FORMAT, STYLE, 1 << 17, 1, with_target=False)
    processor = load_processor(model)
    items, rows = [], []
    for index, loaded in enumerate(make_samples(workload)):
        item = encoder.encode(loaded)
        messages = build_messages(item.sample, item.image_sizes, BOX_FORMAT, STYLE)
        row: dict[str, Any] = {"images": [{"bytes": data, "path": None} for data in loaded.images]}
        if workload.task == "sft":  # rendered here, so that TRL does not apply the chat template in every step
            row["prompt"] = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            row["completion"] = target_text(item.sample, item.image_sizes, BOX_FORMAT, STYLE) + END_OF_TURN
        else:
            row |= {"prompt": messages, "number": index}
        items.append(item)
        rows.append(row)
    return Dataset.from_list(rows).cast_column("images", List(Image())), items


def common_settings(workload: Workload, folder: str) -> dict[str, Any]:
    """The settings that GRPOConfig and SFTConfig share."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": workload.prompts * (workload.group_size if workload.task == "grpo" else 1),
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": workload.gradient_checkpointing,
        "learning_rate": 1e-6,
        "max_steps": MAX_STEPS,
        "bf16": workload.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "model_init_kwargs": {"dtype": workload.dtype, "attn_implementation": "sdpa"},
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "seed": workload.seed,
    }


def build_trainer(model: str, workload: Workload, folder: str, gate: Gate) -> GRPOTrainer | SFTTrainer:
    """TRL's trainer for a workload, with phases and facts reported to the gate.

    Args:
        model: the model folder.
        workload: the step.
        folder: a temporary folder for TRL.
        gate: stops the trainer after every step.
    """
    dataset, items = make_dataset(model, workload)
    shared = {
        "model": model,
        "train_dataset": dataset,
        "peft_config": lora_config(LoraSettings(workload.lora_rank, workload.alpha), Qwen25VL()),
        "callbacks": [Turnstile(gate)],
    }
    settings = common_settings(workload, folder)
    if workload.task == "sft":
        order = {"train_sampling_strategy": "sequential"}
        trainer = SFTTrainer(args=SFTConfig(max_length=None, completion_only_loss=True, **order, **settings), **shared)
        _report_sft(trainer, gate)
        return trainer

    rewards = RewardList()

    def score(completions: list[Any], number: list[int], **_: Any) -> list[float]:
        # The same reward as in this project; TRL passes the column "number" of the rows.
        texts = [completion[0]["content"] for completion in completions]
        pairs = zip(texts, [items[index] for index in number], strict=True)
        group = [Completion(item.sample, item.image_sizes, BOX_FORMAT, text) for text, item in pairs]
        return [reward.total for reward in rewards.score_completions([group])[0]]

    # The loss of the paper: per-sample mean, and the plain KL estimator, as in this project.
    arguments = GRPOConfig(
        num_generations=workload.group_size,
        max_completion_length=workload.completion_tokens,
        temperature=workload.temperature,
        beta=workload.beta,
        loss_type="grpo",
        use_bias_correction_kl=False,
        shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": tokens_never_sampled(model)},
        **settings,
    )
    trainer = GRPOTrainer(args=arguments, reward_funcs=score, **shared)
    _report_grpo(trainer, gate, workload)
    return trainer


class Turnstile(TrainerCallback):
    """Waits at the gate after every optimizer step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.gate.clock.wrap(kwargs["optimizer"], "step", "optimizer")
        if not self.gate.open():
            raise ValueError("the driver stopped TRL before its first step")

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_training_stop = not self.gate.step_done()
        return control


def _report_grpo(trainer: GRPOTrainer, gate: Gate, workload: Workload) -> None:
    """Measure the phases of a GRPO step and report its facts."""
    # Private methods of TRL: another version of TRL may use other names.
    clock = gate.clock
    _time_trainer(trainer, gate)
    clock.wrap(trainer, "_tokenize_prompts", "data")
    clock.wrap(trainer, "_generate_single_turn", "rollout")
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", _scoring_phase)
    clock.wrap(trainer.processing_class.image_processor, "preprocess", "data")
    generate = trainer._generate

    def checked(prompts: list[Any]) -> tuple[Any, ...]:
        prompt_ids, completion_ids, *rest = generate(prompts)
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {workload.completion_tokens}:
            raise ValueError(f"TRL's completions have lengths {sorted(lengths)}, not {workload.completion_tokens}")
        unique = {tuple(ids) for ids in prompt_ids}  # TRL repeats each prompt for its group
        gate.facts["completion_tokens"] = sum(map(len, completion_ids))
        gate.facts["prompt_tokens"] = sum(map(len, unique))
        gate.facts["inputs"] = fingerprint(sorted(list(ids) for ids in unique))
        return prompt_ids, completion_ids, *rest

    trainer._generate = checked


def _report_sft(trainer: SFTTrainer, gate: Gate) -> None:
    """Measure the phases of an SFT step and report its facts."""
    _time_trainer(trainer, gate)
    gate.clock.wrap(trainer, "compute_loss", "forward")
    step = trainer.training_step

    def reported(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(model, inputs, *args, **kwargs)
        real, targets = inputs["attention_mask"].bool(), inputs["labels"] != -100  # without padding; in the loss
        gate.facts["completion_tokens"] = int(targets.sum())
        gate.facts["prompt_tokens"] = int(real.sum() - targets.sum())
        gate.facts["loss"] = float(loss)
        rows: Sequence[torch.Tensor] = inputs["input_ids"]
        gate.facts["inputs"] = fingerprint(sorted(row[m].tolist() for row, m in zip(rows, real, strict=True)))
        return loss

    trainer.training_step = reported


def _time_trainer(trainer: GRPOTrainer | SFTTrainer, gate: Gate) -> None:
    """Measure the phases that both trainers have."""
    gate.clock.wrap(trainer, "get_batch_samples", "data")
    gate.clock.wrap(trainer.accelerator, "backward", "backward")


def _scoring_phase(*_: Any, **__: Any) -> str:
    """The phase of a forward pass: TRL computes the reference without gradient."""
    return "forward" if torch.is_grad_enabled() else "reference"


def train(command: dict[str, Any], gate: Gate) -> None:
    """Run TRL's training loop for a workload; the gate stops it after every step."""
    workload = Workload.from_json(command["workload"])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_trainer(command["model"], workload, folder, gate).train()


if __name__ == "__main__":
    serve(train, trl=trl.__version__)
