"""The LightningCLI of a training phase: its settings, its folder and its checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import preemption
from callbacks.checkpoints import WholeCheckpoints, WindowCheckpoint
from callbacks.rank_watch import RankWatch
from callbacks.rejected_samples import RejectedSamples
from callbacks.run_progress import Progress
from callbacks.save_on_interrupt import SaveOnInterrupt
from datamodules.multi_image import MultiImageData
from datamodules.persistence import folder_lock
from datamodules.persistence.files import write_atomic
from datamodules.persistence.message_text import first_line
from datamodules.persistence.problems import collect_problems
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat
from experiments.runs import preflight, run_identity
from experiments.runs.changes import Choice
from experiments.runs.command_line.null_settings import null_problems
from experiments.runs.command_line.run_facts import run_facts
from experiments.runs.command_line.setting_names import LINKED
from experiments.runs.loggers import LogTo, make_loggers
from experiments.runs.parsers import ShortErrors
from experiments.runs.results import current_commit
from experiments.runs.run_key import made_of
from lightning_modules.policy_module import PolicyModule

DESCRIPTION = "Train one phase from one YAML. Beside the settings: --seed, --gpus, --keep, --redo, --check_without."
# Both runs stay if the new one has another experiment, whose folder is another one.
KEEPS_BOTH = 'To keep both runs, name the new one: --experiment NAME (make sft ARGS="--experiment NAME").'


class AlreadyDone(Exception):
    """The phase folder contains this run, and it is finished."""


class Checked(Exception):
    """The settings and the phase folder have no problem; the command was only asked to check them (--check_without)."""


class TrainParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser, with short errors."""


class TrainCLI(LightningCLI):
    """A LightningCLI with phase folders. One complete YAML holds every setting of a run.

    Args:
        args: the command line; None means sys.argv.
        choice: --keep or --redo, if the user gave one.
        check_without: raise Checked where the phase folder would be claimed, and read nothing from these paths, which
            are still to be made; None trains.
    """

    def __init__(
        self,
        args: list[str] | None = None,
        choice: Choice | None = None,
        check_without: Sequence[str] | None = None,
    ) -> None:
        self.stack, self.choice = ExitStack(), choice  # the stack holds the lock on the phase folder
        self.check_without, self.words = check_without, args
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
        for target, source in LINKED.items():
            names = [name.replace("model.", "model.init_args.", 1) for name in (source, target)]
            parser.link_arguments(*names, compute_fn=BoxFormat if source == "data.box_format" else None)

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
        # 1. Report all problems before weights are loaded. null first: the other checks compare numbers.
        preflight.raise_all([problem for part in self._parts() for problem in null_problems(*part)])
        settings = self.settings()
        problems = preflight.training_problems(settings, self.check_without or ())
        preflight.raise_all(problems + self.constructor_problems())
        # 2. The key tells whether the folder holds this run, another run, or another version of this run.
        run = made_of(settings)
        if self.check_without is not None:
            run_identity.check(self.folder, run, self.choice, KEEPS_BOTH)
            raise Checked
        self.key, self.inputs = run.key, run.inputs
        # 3. Only one run at a time may use the folder. The lock is released at once if this process does not train.
        with ExitStack() as stack:
            if self.is_leader:
                stack.enter_context(folder_lock.locked(self.folder))
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
        problems, module = [], None
        for name, kind, settings in self._parts():
            parser = LightningArgumentParser()
            parser.add_lightning_class_args(kind, name, subclass_mode=name != "data")
            # Each settings object checks itself. All problems are reported together with the module's.
            with collect_problems() as found:
                try:
                    made = parser.instantiate(Namespace({name: settings.clone()}))[name]
                    module = made if name == "model" else module
                except ValueError as error:  # the cause has our message; the parser adds text
                    problems.append(f"{name}: {error.__cause__ or error}")
            problems += [f"{name}.{problem}" for problem in found]
        if isinstance(module, PolicyModule):
            problems += module.data_problems(AnswerForm(self.config.data.answer_form))
        return problems

    def _parts(self) -> list[tuple[str, type, Namespace]]:
        """Module, data and callbacks: name, class or base class, and settings."""
        parts = [("model", self.model_class, self.config.model), ("data", self.datamodule_class, self.config.data)]
        return parts + [("callback", Callback, each) for each in _as_list(self.config.trainer.callbacks)]

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
        # It ends the run inside `on_train_batch_end`, so a callback behind it would miss the last batch.
        kwargs["callbacks"] = sorted(callbacks, key=lambda callback: isinstance(callback, SaveOnInterrupt))
        kwargs["plugins"] = [WholeCheckpoints(), *_as_list(self.config_init.trainer.plugins)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:  # settings that Lightning alone can judge
            raise preflight.SettingsError(f"trainer: {first_line(error)}") from error


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
