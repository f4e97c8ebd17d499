"""Pretrain the nano base model: a tiny Qwen2.5-VL that grounds, lists and describes single images.

    python -m experiments.nano.pretrain --output models/nano-base

First the vision tower learns to see from dense targets (`vision_tower`). Then the language model learns to answer
questions about single pictures, with the tower frozen. At last come questions about one of several pictures, which the
question names (`language`, both stages). No stage has a question that compares pictures.
Example i of a stage is a pure function of (seed, stage, i), so a run that was killed resumes from its last checkpoint
exactly as if nothing had happened.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from callbacks.sound_checkpoints import damage
from datamodules.checkpoints.pretrained import new_model
from datamodules.persistence import folder_lock
from datamodules.persistence.files import read_sound_lines, write_atomic
from datamodules.persistence.processes import ChildWatch, end_with_parent
from experiments.nano.build_model import build_config, build_processor
from experiments.nano.language import InterleavedStage, LanguageStage
from experiments.nano.loop import CHECKPOINT, LOG, StageRun
from experiments.nano.settings import PretrainSettings
from experiments.nano.vision_tower import TowerStage
from experiments.runs.commands import command
from experiments.runs.usage_errors import PlainParser
from lightning_modules.models.qwen_vl import QwenVL

STAGES = (TowerStage, LanguageStage, InterleavedStage)


def is_finished(settings: PretrainSettings, folder: Path) -> bool:
    """Whether `folder` holds the finished base model of these settings.

    Raises:
        ValueError: the folder holds another model, or a base model of other settings.
    """
    if not (folder / "config.json").exists():
        return False
    lines = read_sound_lines(folder / LOG)
    if not lines:
        raise ValueError(f"{folder} holds a model without {LOG}: choose another --output")
    header, *records = lines
    # A setting that is newer than the log had its default's effect, but there was no stage 3.
    old, new = asdict(PretrainSettings(interleaved_sets=0)) | header["settings"], asdict(settings)
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        values = ", ".join(f"{name}={old.get(name)} there and {new.get(name)} here" for name in changed)
        raise ValueError(
            f"{folder} holds a base model of other settings ({values}): remove it or choose another --output"
        )
    # Finished: the log has the last step of the last stage, and the checkpoint is gone.
    last = records[-1] if records else {"stage": None}
    final, steps = InterleavedStage, settings.interleaved_steps
    if steps == 0:
        final, steps = LanguageStage, settings.language_steps
    ended = (last["stage"], last.get("step")) == (final.name, steps)
    return ended and not (folder / CHECKPOINT).exists()


def prepare_folder(settings: PretrainSettings, folder: Path) -> None:
    """Write the untrained model, the tokenizer and the header of the log; or prepare to resume an interrupted run."""
    if is_finished(settings, folder):
        return
    # An interrupted run: drop records of the log from after the checkpoint, because those steps are repeated.
    if (folder / CHECKPOINT).exists():
        state = torch.load(folder / CHECKPOINT, weights_only=True, mmap=True)
        header, *records = read_sound_lines(folder / LOG)
        kept = [record for record in records if _is_before(record, state["stage"], state["step"])]
        write_atomic(folder / LOG, "".join(json.dumps(line) + "\n" for line in (header, *kept)))
        return
    # A new run.
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    processor = build_processor(settings.seed)
    write_atomic(folder / LOG, json.dumps({"settings": asdict(settings)}) + "\n")
    processor.save_pretrained(folder)
    sizes = (settings.text_width, settings.text_depth), (settings.vision_width, settings.vision_depth)
    new_model(build_config(processor.tokenizer, *sizes)).save_pretrained(folder)


def _is_before(record: dict[str, object], stage: str, step: int) -> bool:
    """Whether a record of the log is from this stage and step, or from before."""
    order = [kind.name for kind in STAGES]
    return (order.index(record["stage"]), record["step"]) <= (order.index(stage), step)


def stages_left(settings: PretrainSettings, folder: Path) -> tuple[type[TowerStage | LanguageStage], ...]:
    """The stage of the checkpoint and all later stages. The checkpoint may be at the end of its stage."""
    stages = STAGES if settings.interleaved_steps else STAGES[:-1]
    if not (folder / CHECKPOINT).exists():
        return stages
    stage = torch.load(folder / CHECKPOINT, weights_only=True, mmap=True)["stage"]
    return stages[[kind.name for kind in stages].index(stage) :]


def train(
    settings: PretrainSettings, folder: Path, save_every: int = 200, eval_every: int = 1000, log_every: int = 50
) -> QwenVL:
    """Train the base model, or resume; a finished folder is left as it is.

    Args:
        settings: of the training.
        folder: for the model's files, the log and, until the end, a checkpoint.
        save_every: steps between two checkpoints; a multiple of `log_every`, so that the log of a resumed run lacks no
            loss.
        eval_every: steps between two evaluations.
        log_every: steps between two records of the log.

    Raises:
        ValueError: `save_every` is not a multiple of `log_every`, or the folder holds another model.
    """
    if save_every % log_every:
        raise ValueError(f"save_every={save_every} must be a multiple of log_every={log_every}")
    torch.set_flush_denormal(True)  # optimizer moments of rare tokens decay into denormals, which are slow on a CPU
    # 1. The first process prepares the folder; the others wait.
    parallel = distributed.is_initialized()
    if not parallel or distributed.get_rank() == 0:
        prepare_folder(settings, folder)
    if parallel:
        distributed.barrier()
    if is_finished(settings, folder):
        return QwenVL(str(folder), freeze_vision=False)
    # 2. The stages, each from the checkpoint that the one before has left.
    for kind in stages_left(settings, folder):
        run = StageRun(kind(settings, folder), folder)
        run.train(save_every, eval_every, log_every)
    run.finish()
    return run.policy


def train_process(rank: int, world_size: int, rendezvous: str, settings: PretrainSettings, folder: Path) -> None:
    """Train as one of `world_size` processes.

    Args:
        rank: number of this process.
        world_size: number of processes.
        rendezvous: address at which the processes find each other.
        settings: of the training.
        folder: of the model.
    """
    end_with_parent()
    torch.set_num_threads(1)  # on a CPU, processes with one thread each are faster than one process with threads
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    train(settings, folder)
    distributed.destroy_process_group()


@command
def main() -> None:
    """Entry point of `make base`."""
    parser = PlainParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/nano-base"))
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes; changes rounding only")
    for name, default in asdict(PretrainSettings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    output, processes = arguments.pop("output"), arguments.pop("processes")
    settings = PretrainSettings(**arguments)
    if _is_there(settings, output):
        return
    # Only one command at a time trains there. The one that has waited finds the model of the other.
    with folder_lock.locked(output):
        if not _is_there(settings, output):
            _train_in(settings, output, processes)


def _is_there(settings: PretrainSettings, output: Path) -> bool:
    """Whether the model is finished, which is printed. Ends the program for a folder of other settings and for a
    damaged checkpoint, once for all processes."""
    try:
        if is_finished(settings, output):
            print(f"{output} is there already; to train it again, remove it or choose another --output")
            return True
    except ValueError as error:
        sys.exit(f"no base model: {error}")
    checkpoint = output / CHECKPOINT
    if checkpoint.exists() and (fault := damage(checkpoint)):
        sys.exit(f"{checkpoint} is damaged: {fault}. Put an intact copy there, or remove {output} to train again")
    return False


def _train_in(settings: PretrainSettings, output: Path, processes: int) -> None:
    """Train in this process or in several. ChildWatch kills a stopped one, and its end is reported in one line."""
    if processes == 1:
        train(settings, output)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, f"file://{folder}/rendezvous", settings, output)
        context = multiprocessing.spawn(train_process, arguments, processes, join=False)
        with ChildWatch(context.pids) as watch:
            try:
                while not context.join():
                    pass
            except multiprocessing.ProcessExitedException as error:
                how = watch.fate(error.error_pid, error.exit_code)
                sys.exit(f"process {error.error_index} of {processes} {how}; the same command goes on")


if __name__ == "__main__":
    main()
