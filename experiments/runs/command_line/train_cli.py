"""The LightningCLI of a training phase: its folder, its checks, and the training itself."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from torch.distributed import DistNetworkError

from callbacks import collapse_guard, preemption
from callbacks.checkpoints import WholeCheckpoints, WindowCheckpoint
from callbacks.rank_watch import RankWatch, end_with_launcher
from callbacks.rejected_samples import RejectedSamples
from callbacks.run_progress import Progress, metrics_text
from datamodules.multi_image import MultiImageData
from datamodules.persistence.durations import in_words
from datamodules.persistence.files import StorageError, write_atomic
from datamodules.persistence.message_text import first_line
from datamodules.persistence.problems import collect_problems
from datamodules.samples.boxes import BoxFormat
from experiments.runs import metrics_csv, preflight, run_identity, wandb_runs
from experiments.runs.changes import Choice
from experiments.runs.command_line.run_facts import run_facts
from experiments.runs.loggers import LogTo, make_loggers
from experiments.runs.parsers import ShortErrors
from experiments.runs.results import current_commit
from experiments.runs.run_key import made_of
from experiments.runs.tracking import lineage

log = logging.getLogger(__name__)

DESCRIPTION = "Train one phase from one YAML. Beside the settings: --seed, --gpus, --keep, --redo, --check, --names."


# Both runs stay if the new one has another experiment, whose folder is another one.
KEEPS_BOTH = 'To keep both runs, name the new one: --experiment NAME (make sft ARGS="--experiment NAME").'


class AlreadyDone(Exception):
    """The phase folder contains this run, and it is finished."""


class Checked(Exception):
    """The phase folder can be used for this run; the command was only asked whether it can (--check)."""


class TrainParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser, with short errors."""


class TrainCLI(LightningCLI):
    """A LightningCLI with phase folders. One complete YAML holds every setting of a run.

    Args:
        args: the command line; None means sys.argv.
        choice: --keep or --redo, if the user gave one.
        only_check: raise Checked where the phase folder would be claimed.
    """

    def __init__(self, args: list[str] | None = None, choice: Choice | None = None, only_check: bool = False) -> None:
        self.stack, self.choice = ExitStack(), choice  # the stack holds the lock on the phase folder
        self.only_check, self.words = only_check, args
        self.commit = current_commit(Path(__file__).parent)
        # Lightning, not this project, calls functions that newer versions of jsonargparse have renamed.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        super().__init__(
            LightningModule,
            MultiImageData,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=TrainParser,
            parser_kwargs={"description": DESCRIPTION},
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of a run, and those that follow from others."""
        parser.add_argument("--experiment", type=str, required=True, help="name of the folder in outputs/, W&B group")
        parser.add_argument("--phase", type=str, required=True, help="name of the phase's folder, W&B job type")
        parser.add_argument("--outputs", type=str, default="outputs", help="folder that holds all experiments")
        parser.add_argument("--log_to", type=LogTo, default="wandb", help="wandb, tensorboard, or csv: files alone")
        # Module and data share one seed, one model and one box format.
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("model.init_args.model", "data.processor")
        parser.link_arguments("data.box_format", "model.init_args.box_format", compute_fn=BoxFormat)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """Parse. If it fails because config.yaml comes from another version of the project, explain this."""
        try:
            super().parse_arguments(parser, args)
        except SystemExit as end:  # its message has the problem
            files = saved_configs(sys.argv[1:] if args is None else args) if end.code else []
            for file in files:
                if not can_parse(parser, file):
                    raise run_identity.OtherVersion(file.parent, str(end.code)) from end
            raise
        # Lightning seeds right after this, before the other checks, and would fail with a traceback.
        preflight.raise_all(preflight.seed_problems(self.config.seed_everything))

    @property
    def folder(self) -> Path:
        """The phase folder."""
        return Path(self.config.outputs) / self.config.experiment / self.config.phase

    @property
    def is_leader(self) -> bool:
        """Whether this process owns the phase folder; true in one process of a run."""
        return preemption.is_first_process()

    def settings(self) -> dict:
        """The resolved configuration as plain values, with every default."""
        plain = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, skip_link_targets=False))
        plain["trainer"]["callbacks"] = _as_list(plain["trainer"].get("callbacks"))
        return plain

    def before_instantiate_classes(self) -> None:
        """Check the settings, and claim the phase folder. Raises AlreadyDone if there is nothing to do."""
        # A W&B agent passes the id of a sweep's run in the environment; the folder's name may contain it.
        self.config.phase = os.path.expandvars(self.config.phase)
        settings = self.settings()
        if self.only_check:  # the model of an earlier stage may still be missing
            sources = preflight.shard_list(settings)
            preflight.raise_all([problem for source in sources for problem in preflight.shard_problems(source)])
            run_identity.check(self.folder, made_of(settings), self.choice, KEEPS_BOTH)
            raise Checked
        # 1. Report all problems before weights are loaded.
        preflight.raise_all(preflight.training_problems(settings) + self.constructor_problems())
        # 2. The key tells whether the folder holds this run, another run, or another version of this run.
        run = made_of(settings)
        self.key, self.inputs = run.key, run.inputs
        # 3. Only one run at a time may use the folder. The lock is released at once if this process does not train.
        with ExitStack() as stack:
            if self.is_leader:
                stack.enter_context(run_identity.locked(self.folder))
                facts = {"commit": self.commit} | run_facts("experiments.train", self.words)
                done = run_identity.claim(self.folder, run, choice=self.choice, cure=KEEPS_BOTH, **facts)
            else:
                done = run_identity.wait_for_claim(self.folder, run, choice=self.choice, cure=KEEPS_BOTH)
            if done:
                raise AlreadyDone(self.folder)
            self.stack = stack.pop_all()
        if self.is_leader:
            write_atomic(self.folder / run_identity.CONFIG, self.parser.dump(self.config, skip_unset=False))
        self.config.trainer.default_root_dir = str(self.folder)

    def constructor_problems(self) -> list[str]:
        """The problems that the constructors of module, data and callbacks find. All these constructors are cheap."""
        parts = [("model", self.model_class, self.config.model), ("data", self.datamodule_class, self.config.data)]
        parts += [("callback", Callback, each) for each in _as_list(self.config.trainer.callbacks)]
        problems = []
        for name, kind, settings in parts:
            parser = LightningArgumentParser()
            parser.add_lightning_class_args(kind, name, subclass_mode=name != "data")
            # Each settings object checks itself. All problems are reported together with the module's.
            with collect_problems() as found:
                try:
                    parser.instantiate(Namespace({name: settings.clone()}))
                except ValueError as error:  # the cause has our message; the parser adds text
                    problems.append(f"{name}: {error.__cause__ or error}")
            problems += [f"{name}.{problem}" for problem in found]
        return problems

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """The Trainer, with this project's loggers, checkpoints, RankWatch and RejectedSamples unless the YAML has
        others."""
        if self.config_init.trainer.logger is None:
            kwargs["logger"] = make_loggers(self.folder, self.key, self.config.log_to)
        callbacks = _as_list(self.config_init.trainer.callbacks)
        for kind in (RejectedSamples, RankWatch):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.insert(0, kind())
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if self.config_init.trainer.enable_progress_bar is not False and not has_bar:
            callbacks.insert(0, Progress())  # Lightning's own shows one bar for each epoch, and nothing in a log
        checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        if not checkpoints and self.config_init.trainer.enable_checkpointing is not False:
            checkpoints = [WindowCheckpoint(every_n_minutes=10)]  # Lightning's own may save inside a window
            callbacks += checkpoints
        for callback in checkpoints:
            if callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")
        kwargs["callbacks"] = callbacks
        kwargs["plugins"] = [WholeCheckpoints(), *_as_list(self.config_init.trainer.plugins)]
        return super().instantiate_trainer(**kwargs)


def _as_list(value: Any) -> list[Any]:
    """Callbacks or plugins, of which Lightning takes a single one without a list, too."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def saved_configs(args: list[str]) -> list[Path]:
    """The arguments that are the config.yaml of an existing run."""
    files = [Path(word.removeprefix("--config=")) for word in args]
    return [
        file for file in files if file.name == run_identity.CONFIG and (file.parent / run_identity.STARTED).is_file()
    ]


def can_parse(parser: LightningArgumentParser, config: Path) -> bool:
    """Whether this version can parse the file alone; nothing is printed."""
    try:
        with redirect_stderr(StringIO()):
            parser.parse_args(["--config", str(config)])
    except SystemExit:
        return False
    return True


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
    # Each rank announces that it begins to wait for the others.
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    # Checkpoints are loaded with weights_only=True (`fit`). Lightning warns when it reads a part of them a second time.
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)


def run(args: list[str] | None, choice: Choice | None, only_check: bool = False) -> None:
    """Train the phase of a command line, unless it is done.

    Args:
        args: the command line; None means sys.argv.
        choice: --keep or --redo, if the user gave one.
        only_check: end where the phase folder would be claimed. Raises OtherRun or CodeChanged if that needs an answer.
    """
    quieten()
    end_with_launcher()
    preemption.requeue_at_once()  # until training starts; SaveOnInterrupt then replaces this handler
    while True:  # one pass, and one more after each rollback
        try:
            cli = TrainCLI(args, choice, only_check)
            with cli.stack:
                return fit(cli)
        except Checked:
            return None
        except AlreadyDone as done:
            print(f"{done} is already done with these settings and inputs", flush=True)
            return print(next_commands(Path(str(done))), end="", flush=True)
        except collapse_guard.RolledBack as rolled_back:
            cli = None  # frees the old weights before the new ones are loaded
            wandb_runs.finish_run()
            print(rolled_back, flush=True)
        except DistNetworkError as error:  # the other ranks have not found this one
            port = f"MASTER_PORT={os.environ.get('MASTER_PORT')}"
            problem = f"{port}: {first_line(error)}. Name a free port, such as MASTER_PORT=29511"
            raise preflight.SettingsError(problem) from error
