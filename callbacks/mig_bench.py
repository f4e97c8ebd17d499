"""MIG-Bench before, inside and after a phase of training; and the evaluation itself, which needs no Trainer."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from callbacks.checkpoints import RunStopped
from callbacks.encoding import encode_ahead, prompt_encoder, rollout_engine
from callbacks.evaluation import EvaluationSettings, require_positive
from datamodules.benchmarks.mig_bench import load_images, load_mig_bench
from datamodules.encoding.encoder import Encoder
from datamodules.metrics.mig_scoring import Prediction, format_table, score_answer, score_refused, summarise
from datamodules.persistence.files import Journal, StorageError, fingerprint, make_folder, read_journal, write_json
from datamodules.predictors import split_windows
from datamodules.samples.sample import LoadedSample, Sample, SampleError
from datamodules.streaming.path_fingerprint import path_fingerprint
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutEngine, RolloutSettings
from lightning_modules.serving.generation_rules import Generation, rules

log = logging.getLogger(__name__)
# Prompts given to the engine at once, in batches: it adapts its weights once for them, and they are in memory together.
BATCHES_PER_CALL = 4


def evaluate_mig_bench(
    policy: QwenVL,
    engine: RolloutEngine,
    encoder: Encoder,
    samples: Sequence[Sample],
    load: Callable[[Sample], LoadedSample],
    settings: EvaluationSettings,
    journal: Journal | None = None,
    show_progress: bool = True,
) -> list[Prediction]:
    """One prediction for each sample, in the order of `samples`.

    Predictions are appended to `journal` as they come, and those that it holds already are not made again. A question
    that cannot be put to the model counts as wrong, under the name of its fault.
    """
    done = {record["id"]: Prediction.from_json(record) for record in journal.records} if journal else {}
    windows = question_windows((sample for sample in samples if sample.id not in done), settings)
    rollout_settings = RolloutSettings.of_evaluation(settings.max_new_tokens, settings.batch_prompts)
    with tqdm(
        total=len(samples),
        initial=len(samples) - sum(map(len, windows)),
        desc="MIG-Bench",
        unit="question",
        disable=not show_progress,
    ) as bar:
        for window in encode_ahead(encoder, windows, load):
            refused = [(sample, item) for sample, item in window if isinstance(item, SampleError)]
            items = [item.to(policy.device) for _, item in window if not isinstance(item, SampleError)]
            for _, error in refused:
                log.warning("counted as wrong: %s", error)
            start = bar.n + len(refused)
            rollouts = engine.generate(
                items, rollout_settings, on_progress=lambda n, start=start: bar.update(start + n - bar.n)
            )
            predictions = [score_refused(sample, error.rule) for sample, error in refused]
            for item, (rollout,) in zip(items, rollouts, strict=True):
                predictions.append(
                    score_answer(
                        item.sample,
                        rollout.text,
                        item.image_sizes,
                        encoder.box_format,
                        num_tokens=len(rollout.token_ids),
                        finished=rollout.finished,
                    )
                )
            if journal is not None:
                journal.append(prediction.to_json() for prediction in predictions)
            done |= {prediction.id: prediction for prediction in predictions}
            bar.update(start + len(items) - bar.n)
    return [done[sample.id] for sample in samples]


def question_windows(samples: Iterable[Sample], settings: EvaluationSettings) -> list[Sequence[Sample]]:
    """Questions that are given to the engine together. Windows taken out whole are windows again.

    Many images first: neighbours in length share a batch, memory is tested at once, the time left is not flattered.
    """
    ordered = sorted(samples, key=lambda sample: (-len(sample.images), sample.task))
    return split_windows(ordered, BATCHES_PER_CALL * settings.batch_prompts)


def limit_tasks(samples: Sequence[Sample], limit_per_task: int | None) -> list[Sample]:
    """At most `limit_per_task` samples of each task, spread evenly over the file (neighbours there share images)."""
    if limit_per_task is None:
        return list(samples)
    tasks: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        tasks[sample.task].append(sample)
    return [
        members[index * len(members) // min(limit_per_task, len(members))]
        for members in tasks.values()
        for index in range(min(limit_per_task, len(members)))
    ]


def policy_fingerprint(policy: QwenVL) -> str:
    """Of the weights that the policy started from, and of all that training has changed in it."""
    digest = hashlib.sha256(path_fingerprint(policy.processor_path).encode())
    for name, tensor in policy.trained_tensors():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluation_key(
    policy: QwenVL,
    encoder: Encoder,
    annotations: str,
    image_root: str,
    samples: Sequence[Sample],
    settings: EvaluationSettings,
    generation: Generation = "greedy",
) -> str:
    """Hash of all that predictions depend on; images count by name and size in bytes.

    Args:
        policy: its weights count, as they are in memory.
        encoder: how questions are put.
        annotations: the benchmark's file; its content counts.
        image_root: the image names begin here.
        samples: the questions that are asked.
        settings: length of an answer, questions at a time.
        generation: by which rules answers are decoded.
    """
    images = sorted({name for sample in samples for name in sample.images})
    return fingerprint(
        policy_fingerprint(policy),
        path_fingerprint(annotations),
        [(name, (Path(image_root) / name).stat().st_size) for name in images],
        [sample.id for sample in samples],
        encoder.form(),
        asdict(settings),
        rules(generation),
    )


class MIGBench(Callback):
    """Evaluates the policy while it trains, every `every_n_steps` updates, on `validation_limit_per_task` questions of
    each task, and, where wished, `before` and `after` fitting on all questions.

    Everything is logged as mig_bench_val/…: these are the questions on which settings are chosen. mig_bench/… is the
    benchmark, which experiments.evaluate asks between the phases and logs to the same W&B run. `after` is for the trial
    of a sweep, whose last value of mig_bench_val/avg must be that of all questions.

    `annotations` is MIG_data.json, `image_root` the folder that holds "MIG-Bench/". Questions are put as the
    datamodule puts its own. Each evaluation has a folder in <folder>/ ("before", "step_000100", "after"; by default
    <default_root_dir>/mig_bench) with predictions.jsonl, which an interrupted run goes on from, and mig_bench.json,
    the summary. With several ranks the folder must be shared by them. Where an answer or the summary cannot be written,
    an evaluation while it trains is warned of and left out: nothing waits for it, and the run has checkpoints to write.
    `before` and `after` end the run with `RunStopped`.
    """

    def __init__(
        self,
        annotations: str,
        image_root: str,
        before: bool = False,
        after: bool = False,
        every_n_steps: int | None = None,
        validation_limit_per_task: int = 20,
        max_new_tokens: int = 1024,
        batch_prompts: int = 32,
        max_prompt_tokens: int | None = None,
        folder: str | None = None,
    ) -> None:
        self.annotations, self.image_root, self.folder = annotations, image_root, folder
        self.before, self.after, self.every_n_steps = before, after, every_n_steps
        self.validation_limit_per_task = validation_limit_per_task
        self.settings = EvaluationSettings(max_new_tokens, batch_prompts)
        self.max_prompt_tokens = max_prompt_tokens
        every = {"every_n_steps": every_n_steps, "max_prompt_tokens": max_prompt_tokens}
        require_positive("MIGBench", validation_limit_per_task=validation_limit_per_task, **every)
        self.samples: list[Sample] = []
        self._resumed_step = 0
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Read before any weights are: a wrong path should fail in the first second.
        self.samples, dirty = load_mig_bench(self.annotations, self.image_root)
        if dirty and trainer.is_global_zero:
            log.warning("%s: %s", self.annotations, dirty)
        self._home(trainer).mkdir(parents=True, exist_ok=True)

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """Of a prompt with its completion, in tokens (`AsksEngine`)."""
        asks = self.before or self.after or self.every_n_steps is not None
        return (self.max_prompt_tokens or max_prompt_tokens) + self.settings.max_new_tokens if asks else 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed_step = self._last_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before and self._resumed_step == 0:  # else the weights are no longer those from before
            self._evaluate("before", trainer, pl_module, self.samples, required=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last, self._last_step = self._last_step, trainer.global_step
        # A rollout may be worth several updates: the count need not stop at a multiple.
        if self.after and trainer.global_step == trainer.max_steps:
            return  # all questions are about to be asked
        if self.every_n_steps and last // self.every_n_steps < trainer.global_step // self.every_n_steps:
            samples = limit_tasks(self.samples, self.validation_limit_per_task)
            self._evaluate(f"step_{trainer.global_step:06d}", trainer, pl_module, samples)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_train_end: that does not come when a finished run is started again to get its missing evaluation.
        if self.after:
            pl_module.to(trainer.strategy.root_device)  # the strategy has taken it down to the CPU
            self._evaluate("after", trainer, pl_module, self.samples, required=True)

    def _home(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "mig_bench")

    def _evaluate(
        self, name: str, trainer: Trainer, pl_module: LightningModule, samples: list[Sample], required: bool = False
    ) -> None:
        folder = self._home(trainer) / name
        encoder = prompt_encoder(trainer.datamodule.encoder, self.max_prompt_tokens)
        key = evaluation_key(pl_module.policy, encoder, self.annotations, self.image_root, samples, self.settings)
        trainer.strategy.barrier("mig_bench")
        fault: StorageError | None = None
        with pl_module.policy.gathered():
            try:
                make_folder(folder)
                evaluate_mig_bench(
                    pl_module.policy,
                    rollout_engine(pl_module),
                    encoder,
                    samples[trainer.global_rank :: trainer.world_size],
                    partial(load_images, image_root=self.image_root),
                    self.settings,
                    Journal(folder / _predictions_file(trainer.global_rank), key),
                    show_progress=trainer.is_global_zero,
                )
            except StorageError as error:
                fault = error
        all_written = trainer.strategy.reduce_boolean_decision(fault is None, all=True)  # all ranks meet here
        if all_written and trainer.is_global_zero:
            try:
                self._summarise(folder, key, trainer, samples)
            except StorageError as error:
                fault = error
        if trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            return
        if required:
            reason = fault or "another rank could not write"
            raise RunStopped(f"MIG-Bench, {name}: {reason}. The same command goes on there")
        if fault is not None:
            log.warning("MIG-Bench of %s is left out: %s", name, fault)

    def _summarise(self, folder: Path, key: str, trainer: Trainer, samples: Sequence[Sample]) -> None:
        """Put the answers of all ranks together, on the first."""
        files = [folder / _predictions_file(rank) for rank in range(trainer.world_size)]
        records = [record for file in files for record in read_journal(file, key)]
        found = {record["id"]: Prediction.from_json(record) for record in records}
        summary = summarise([found[sample.id] for sample in samples])
        write_json(folder / "mig_bench.json", {"key": key, "step": trainer.global_step} | summary)
        values = summary_metrics(summary, "mig_bench_val")
        for logger in trainer.loggers:  # at the step that Lightning logs its own metrics at
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        # Where WindowCheckpoint's `monitor` finds it; the first rank alone keeps and removes checkpoints.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        print(f"\n{folder.name}, step {trainer.global_step}\n{format_table(summary)}", flush=True)


def summary_metrics(summary: dict[str, Any], prefix: str) -> dict[str, float]:
    """What is logged of a summary: the averages, every task, the rates and the mean length."""
    names = ("avg", "in_domain", "out_of_domain", "acc_0.3", "acc_0.7", "mean_iou")
    names += ("format_rate", "truncated_rate", "mean_tokens")
    metrics = {f"{prefix}/{name}": summary[name] for name in names if summary[name] is not None}
    metrics |= {f"{prefix}/{task}": accuracy for task, accuracy in summary["tasks"].items()}
    return metrics | {f"{prefix}/official_avg": summary["official"]["avg"]}


def _predictions_file(rank: int) -> str:
    return "predictions.jsonl" if rank == 0 else f"predictions-rank{rank}.jsonl"
