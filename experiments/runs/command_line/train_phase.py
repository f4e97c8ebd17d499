"""Train one phase from its command line: resume, train, mark the phase as done, and start again after a rollback."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from torch.distributed import DistNetworkError

from callbacks import collapse_guard, preemption
from callbacks.rank_watch import end_with_launcher
from callbacks.run_progress import metrics_text
from datamodules.persistence.durations import in_words
from datamodules.persistence.files import StorageError
from datamodules.persistence.garbage import without_collection
from datamodules.persistence.message_text import first_line
from experiments.runs import metrics_csv, preflight, run_identity, wandb_runs
from experiments.runs.changes import Choice
from experiments.runs.command_line.train_cli import AlreadyDone, Checked, TrainCLI
from experiments.runs.tracking import lineage

log = logging.getLogger(__name__)


def run(args: list[str] | None, choice: Choice | None, check_without: Sequence[str] | None = None) -> None:
    """Train the phase of a command line, unless it is done.

    Args:
        args: the command line; None means sys.argv.
        choice: --keep or --redo, if the user gave one.
        check_without: end where the phase folder would be claimed, and read nothing from these paths, which are still
            to be made; None trains. Raises OtherRun or CodeChanged if claiming needs an answer.
    """
    quieten()
    end_with_launcher()
    preemption.requeue_at_once()  # until training starts; SaveOnInterrupt then replaces this handler
    while True:  # one pass, and one more after each rollback
        try:
            with without_collection():  # parsing imports the classes of the run
                cli = TrainCLI(args, choice, check_without)
            with cli.stack:
                fit(cli)
            return
        except Checked:
            return
        except AlreadyDone as done:
            print(f"{done} is already done with these settings and inputs", flush=True)
            print(next_commands(Path(str(done))), end="", flush=True)
            return
        except collapse_guard.RolledBack as rolled_back:
            cli = None  # frees the old weights before the new ones are loaded
            wandb_runs.finish_run()
            print(rolled_back, flush=True)
        except DistNetworkError as error:  # the other ranks have not found this one
            port = f"MASTER_PORT={os.environ.get('MASTER_PORT')}"
            problem = f"{port}: {first_line(error)}. Name a free port, such as MASTER_PORT=29511"
            raise preflight.SettingsError(problem) from error


def fit(cli: TrainCLI) -> None:
    """Train to the end, from the last checkpoint if there is one, and mark the phase as done."""
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(cli.settings() | {"commit": cli.commit})
    # 1. Find the checkpoint to resume from: the newest intact one.
    if cli.is_leader:
        collapse_guard.finish_rollback(cli.folder)
    checkpoint = collapse_guard.last_whole(cli.folder, cli.is_leader)
    if checkpoint and cli.is_leader:
        print(f"going on from {checkpoint}", flush=True)
    # 2. Train.
    start = time.monotonic()
    try:
        # weights_only: a checkpoint is data; it must not run code.
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # Lightning raises this after Ctrl-C or SIGTERM
        if cli.is_leader:
            saved = collapse_guard.last_good(cli.folder) or "what is saved"  # rejection sampling has no checkpoint
            print(f"stopped; the same command goes on from {saved}", flush=True)
        raise
    except RuntimeError as error:  # PyTorch may report the end of a worker process at any point of the code
        if failure := cli.datamodule.workers_failure(error):
            raise failure from error
        raise
    finally:
        if cli.is_leader:
            merge_metrics(cli.folder)
    # 3. Mark the phase as done, unless nothing was learnt. (MergeAdapter checks the weights, but not every run has it.)
    if cli.trainer.global_step == 0:
        cli.model.require_learnt()
    if cli.is_leader:
        seconds = time.monotonic() - start
        run_identity.finish(cli.folder, cli.key, seconds=round(seconds, 1))
        for logger in cli.trainer.loggers:
            if isinstance(logger, WandbLogger) and (cli.folder / "merged").is_dir():
                lineage.log_training(logger.experiment, cli.folder, cli.inputs["data.shards"])
        measured = metrics_text(cli.trainer.callback_metrics)
        print(f"{cli.folder}: {cli.trainer.global_step} steps in {in_words(seconds)}; {measured}", flush=True)
        print(next_commands(cli.folder), end="", flush=True)


def next_commands(folder: Path) -> str:
    """The path of the merged model of a finished phase, and the next commands; "" without a merged model."""
    merged = folder / "merged"
    if not merged.is_dir():
        return ""
    return (
        f"model: {merged}\n"
        f"measure it: make eval MODEL={merged}\n"
        f'ask it:     make ask MODEL={merged} IMAGES="a.jpg b.jpg" QUESTION="..."\n'
    )


def merge_metrics(folder: Path) -> None:
    """Write metrics.csv from the files of all attempts."""
    try:
        metrics_csv.merge_attempts(folder)
    except StorageError as error:  # only a warning, so that it does not hide the error that has ended the run
        log.warning("metrics.csv is not up to date: %s", error)


def quieten() -> None:
    """Silence Lightning's hints about settings that are intended here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning uses an old name of PyTorch's tree utilities; this project does not.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # Each rank announces the seed, which is one of the settings, and then that it begins to wait for the others.
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    # Checkpoints are loaded with weights_only=True (`fit`). Lightning warns when it reads a part of them a second time.
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)
