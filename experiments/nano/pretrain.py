"""Pretrain the nano base: a tiny Qwen2.5-VL that grounds, lists and describes in one image, and has never seen two.

    python -m experiments.nano.pretrain --output models/nano-base

Two stages: the vision tower learns to see from dense targets (`vision_tower`), then the language model learns to answer
with the tower frozen (`language`). Picture i of a stage is a pure function of (seed, stage, i), so a run that is
killed goes on from its last checkpoint exactly as if nothing had happened.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from callbacks.sound_checkpoints import damage
from datamodules.checkpoints.pretrained import new_model
from datamodules.persistence.processes import ChildWatch
from experiments.nano.build_model import build_config, build_processor
from experiments.nano.language import LanguageStage
from experiments.nano.loop import CHECKPOINT, LOG, StageRun
from experiments.nano.settings import BaseSettings
from experiments.nano.vision_tower import TowerStage
from experiments.runs.commands import command
from lightning_modules.models.qwen_vl import QwenVL

STAGES = (TowerStage, LanguageStage)


def is_finished(settings: BaseSettings, folder: Path) -> bool:
    """Whether the base of these settings is there. Raises ValueError if `folder` holds a model of another origin."""
    if not (folder / "config.json").exists():
        return False
    if not (folder / LOG).exists():
        raise ValueError(f"{folder} holds a model without {LOG}: choose another --output")
    header, *records = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    old, new = header["settings"], asdict(settings)
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        values = ", ".join(f"{name}={old.get(name)} there and {new.get(name)} here" for name in changed)
        raise ValueError(f"{folder} holds a base of other settings ({values}): remove it or choose another --output")
    last = records[-1] if records else {"stage": None}
    ended = (last["stage"], last.get("step")) == (LanguageStage.name, settings.language_steps)
    return ended and not (folder / CHECKPOINT).exists()


def prepare_folder(settings: BaseSettings, folder: Path) -> None:
    """The untrained model, tokenizer and log in `folder`, or of an interrupted run its log up to the checkpoint."""
    if is_finished(settings, folder):
        return
    if (folder / CHECKPOINT).exists():
        state = torch.load(folder / CHECKPOINT, weights_only=True, mmap=True)
        header, *records = (folder / LOG).read_text().splitlines(keepends=True)
        kept = [line for line in records if _is_before(json.loads(line), state["stage"], state["step"])]
        (folder / LOG).write_text(header + "".join(kept))
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    processor = build_processor(settings.seed)
    (folder / LOG).write_text(json.dumps({"settings": asdict(settings)}) + "\n")
    processor.save_pretrained(folder)
    sizes = (settings.text_width, settings.text_depth), (settings.vision_width, settings.vision_depth)
    new_model(build_config(processor.tokenizer, *sizes)).save_pretrained(folder)


def _is_before(record: dict[str, object], stage: str, step: int) -> bool:
    order = [kind.name for kind in STAGES]
    return (order.index(record["stage"]), record["step"]) <= (order.index(stage), step)


def stages_left(folder: Path) -> tuple[type[TowerStage] | type[LanguageStage], ...]:
    """The stage of the folder's checkpoint, which may be at its end, and those after it."""
    if not (folder / CHECKPOINT).exists():
        return STAGES
    stage = torch.load(folder / CHECKPOINT, weights_only=True, mmap=True)["stage"]
    return STAGES[[kind.name for kind in STAGES].index(stage) :]


def train(
    settings: BaseSettings, folder: Path, save_every: int = 200, eval_every: int = 1000, log_every: int = 50
) -> QwenVL:
    """Train, or go on training, in `folder`: the model's files, the log and, until the end, a checkpoint.

    A finished folder is left as it is. `save_every` must be a multiple of `log_every`, so that no loss is left out of
    the log of a resumed run.
    """
    if save_every % log_every:
        raise ValueError(f"save_every={save_every} must be a multiple of log_every={log_every}")
    torch.set_flush_denormal(True)  # optimizer moments of rare tokens decay into denormals, which are slow on a CPU
    parallel = distributed.is_initialized()
    if not parallel or distributed.get_rank() == 0:
        prepare_folder(settings, folder)
    if parallel:
        distributed.barrier()
    if is_finished(settings, folder):
        print(f"{folder} is finished: remove it or choose another --output to train anew")
        return QwenVL(str(folder), freeze_vision=False)
    for kind in stages_left(folder):
        run = StageRun(kind(settings, folder), folder)
        run.train(save_every, eval_every, log_every)
    run.finish()
    return run.policy


def train_process(rank: int, world_size: int, rendezvous: str, settings: BaseSettings, folder: Path) -> None:
    """One of `world_size` processes, each with one thread: on a CPU they are faster than one process with threads."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    train(settings, folder)
    distributed.destroy_process_group()


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/nano-base"))
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes; changes rounding only")
    for name, default in asdict(BaseSettings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    output, processes = arguments.pop("output"), arguments.pop("processes")
    settings = BaseSettings(**arguments)
    checkpoint = output / CHECKPOINT
    if checkpoint.exists() and (fault := damage(checkpoint)):
        sys.exit(f"{checkpoint} is damaged: {fault}. Put a whole copy there, or remove {output} to train anew")
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
