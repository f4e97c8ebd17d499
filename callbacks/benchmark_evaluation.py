"""Measure one of the paper's benchmarks before, during and after a phase of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoints import RunStopped
from datamodules.benchmarks.base import Benchmark, limit_columns
from datamodules.benchmarks.registry import BENCHMARKS, is_benchmark, load_benchmark
from datamodules.benchmarks.shard_folders import is_shards, shards_name
from datamodules.metrics.result_files import format_result, result_metrics, write_evaluation
from datamodules.metrics.scoring import score_replies
from datamodules.persistence.files import StorageError, make_folder
from datamodules.persistence.problems import Problems
from datamodules.persistence.progress_lines import Counted
from datamodules.persistence.user_error import UserError
from datamodules.samples.sample import Sample
from lightning_modules.metrics.summary import summarise
from lightning_modules.predictors.ask import (
    answers_folder,
    answers_key,
    ask_share,
    questions_key,
    read_answers,
    share_of,
)
from lightning_modules.predictors.base import Decoding
from lightning_modules.predictors.encode_ahead import prompt_encoder, rollout_engine
from lightning_modules.predictors.policy import BATCHES_PER_CHUNK, PolicyPredictor

log = logging.getLogger(__name__)


class BenchmarkEvaluation(Callback):
    """Evaluates the policy on one benchmark during training and, if asked for, before and after it.

    All metrics are logged as <benchmark>_val/…. Settings are chosen on these questions. The metrics <benchmark>/… come
    from the full benchmark, which experiments.evaluate measures between the phases and logs to the same W&B run.

    Each evaluation has a folder in <folder>/ ("before", "step_000100", "after") with predictions.jsonl, result.json and
    answers/. An interrupted run continues from the journals in answers/. All ranks must see the same folder. The
    prompts have the same form as the datamodule's own prompts.

    If an answer or the summary cannot be written, an evaluation inside training is skipped with a warning, because no
    later step needs it. An evaluation before or after training ends the run with `RunStopped`.

    Args:
        benchmark: the name of a benchmark, such as ref_l4 (datamodules/benchmarks/registry.py), or the path of a folder
            of shards.
        data_root: the folder that holds the benchmark's own folder; shards do not need it.
        before: evaluate on all questions before the first update.
        after: evaluate on all questions when training ends. A trial of a sweep needs this, because the sweep reads the
            value that was logged last.
        every_n_steps: number of updates between two evaluations; null means no evaluation inside training.
        limit: number of questions from each column (in MIG-Bench: each task) inside training.
        max_new_tokens: largest number of tokens of an answer.
        prompts_per_batch: number of questions that are answered at the same time.
        max_prompt_tokens: a question with a longer prompt counts as wrong; null takes the datamodule's limit.
        folder: where the evaluations are written; null takes <default_root_dir>/<benchmark>.
    """

    def __init__(
        self,
        benchmark: str,
        data_root: str = "",
        before: bool = False,
        after: bool = False,
        every_n_steps: int | None = None,
        limit: int = 20,
        max_new_tokens: int = 1024,
        prompts_per_batch: int = 32,
        max_prompt_tokens: int | None = None,
        folder: str | None = None,
    ) -> None:
        problems = Problems()
        known = ", ".join(map(repr, BENCHMARKS))
        problems.require(is_benchmark(benchmark), f"must be one of {known}, or a folder of shards", benchmark=benchmark)
        problems.positive(limit=limit)
        problems.positive_or_null(every_n_steps=every_n_steps, max_prompt_tokens=max_prompt_tokens)
        problems.raise_all(type(self).__name__)
        self.name = shards_name(benchmark) if is_shards(benchmark) else benchmark
        self.source, self.data_root, self.folder = benchmark, data_root, folder
        self.before, self.after, self.every_n_steps, self.limit = before, after, every_n_steps, limit
        self.decoding = Decoding(max_new_tokens, prompts_per_batch)
        self.max_prompt_tokens = max_prompt_tokens
        self.benchmark: Benchmark | None = None
        self._last_step = 0

    def load(self) -> Benchmark:
        """Read the questions. Raises an error if a file is missing or has another format."""
        return load_benchmark(self.source, self.data_root)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The questions are read before any weights, so that a wrong path fails in the first second.
        try:
            self.benchmark = self.load()
        except (OSError, ValueError) as error:
            raise UserError(f"{type(self).__name__}: {error}") from error
        if self.benchmark.dropped and trainer.is_global_zero:
            log.warning("%s: %s", self.name, dict(self.benchmark.dropped))
        self._home(trainer).mkdir(parents=True, exist_ok=True)

    def longest_sequence(self, max_prompt_tokens: int, max_new_tokens: int) -> int:
        """The longest prompt with its completion, in tokens; 0 if there are no questions (`AsksEngine`)."""
        asks = self.before or self.after or self.every_n_steps is not None
        return (self.max_prompt_tokens or max_prompt_tokens) + self.decoding.max_new_tokens if asks else 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run has made this evaluation. (Sharded strategies load the checkpoint later than this.)
        if self.before and trainer.ckpt_path is None:
            self._evaluate("before", trainer, pl_module, self.benchmark.samples, required=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last, self._last_step = self._last_step, trainer.global_step
        if self.after and trainer.global_step == trainer.max_steps:
            return  # `after` asks all questions next
        # One rollout may lead to several updates, so the count may skip a multiple of `every_n_steps`.
        if self.every_n_steps and last // self.every_n_steps < trainer.global_step // self.every_n_steps:
            samples = limit_columns(self.benchmark.samples, self.limit)
            self._evaluate(f"step_{trainer.global_step:06d}", trainer, pl_module, samples)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end: Lightning does not call it if a finished run is started again for a missing evaluation.
        if self.after:
            pl_module.to(trainer.strategy.root_device)  # the strategy has moved it to the CPU
            self._evaluate("after", trainer, pl_module, self.benchmark.samples, required=True)

    def _home(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / self.name)

    def _evaluate(
        self, name: str, trainer: Trainer, pl_module: LightningModule, samples: Sequence[Sample], required: bool = False
    ) -> None:
        """Ask, score, summarise and write one evaluation; every rank calls this."""
        home, policy = self._home(trainer) / name, pl_module.policy
        encoder = prompt_encoder(trainer.datamodule.encoder, self.max_prompt_tokens)
        # Inside training there are few questions. Chunks of one batch make sure that every rank gets some.
        batches = BATCHES_PER_CHUNK if required else 1
        predictor = PolicyPredictor(policy, rollout_engine(pl_module), encoder, self.decoding, batches)
        key = answers_key(self.benchmark, predictor)  # it gathers the trained weights, so all ranks call it
        fault: StorageError | None = None

        # 1. Ask. Each rank answers its share and journals it.
        trainer.strategy.barrier("evaluation")
        with policy.gathered():
            try:
                self._ask(predictor, samples, home, key, trainer)
            except StorageError as error:
                fault = error

        # 2. Score, summarise and write on rank 0, after every rank has written its answers.
        all_written = trainer.strategy.reduce_boolean_decision(fault is None, all=True)  # all ranks meet here
        if all_written and trainer.is_global_zero:
            try:
                self._finish(predictor, samples, home, key, trainer)
            except StorageError as error:
                fault = error

        # 3. All ranks go on, or end, together.
        if trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            return
        if required:
            reason = fault or "another rank could not write"
            raise RunStopped(f"{self.name}, {name}: {reason}. The same command goes on there")
        if fault is not None:
            log.warning("%s of %s is left out: %s", self.name, name, fault)

    def _ask(
        self, predictor: PolicyPredictor, samples: Sequence[Sample], home: Path, key: str, trainer: Trainer
    ) -> None:
        """Ask this rank's share of the questions and write the answers to its journal. Raises StorageError."""
        folder = answers_folder(home, self.name, key)
        for path in (home, folder.parent, folder):
            make_folder(path)  # one level at a time, so that nothing is created in the mount point of a lost filesystem
        rank, world_size = trainer.global_rank, trainer.world_size
        total = sum(map(len, share_of(samples, predictor, rank, world_size)))
        with Counted(total, self.name, "question", is_shown=trainer.is_global_zero) as progress:
            for count in ask_share(predictor, samples, self.benchmark, folder, key, rank, world_size):
                progress.update(count)

    def _finish(
        self, predictor: PolicyPredictor, samples: Sequence[Sample], home: Path, key: str, trainer: Trainer
    ) -> None:
        """Score the answers of all ranks; write, log and print the result. Raises StorageError."""
        benchmark = self.benchmark
        replies = read_answers(answers_folder(home, self.name, key), key)
        predictions = score_replies(benchmark, samples, replies, predictor.box_format, predictor.answer_form)
        facts = {"benchmark": self.name, "key": key, "step": trainer.global_step, "generation": "greedy"}
        facts["questions"] = questions_key(benchmark)
        result = facts | summarise(predictions, benchmark.rule, benchmark.official, benchmark.averages)
        write_evaluation(home, predictions, result)

        values = result_metrics(result, "_val")
        for logger in trainer.loggers:  # with the step number that Lightning uses for its own metrics
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        # The `monitor` of WindowCheckpoint reads the value here. Only rank 0 keeps and removes checkpoints.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        print(f"\n{home.name}, step {trainer.global_step}\n{format_result(result)}", flush=True)
