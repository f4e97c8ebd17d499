"""Ctrl-C and SIGTERM cost nothing: the batch is finished, a checkpoint written, and the same command goes on from it.

What else guards a run lies elsewhere. A loss that is not finite stops it with its sample ids saved (`PolicyModule`).
Checkpoints are whole or absent (`callbacks/checkpoints.py`).
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import preemption
from callbacks.checkpoints import log_batch, save
from lightning_modules.rollouts.vllm.server_pool import ServersLost

FILE_NAME = "interrupted.ckpt"


class SaveOnInterrupt(Callback):
    """Saves <checkpoint folder>/interrupted.ckpt at the end of the batch in which the signal came, and stops.

    Lightning alone would stop at Ctrl-C in the middle of a batch, and its `save_on_exception` would also save weights
    that another error has spoilt. A second Ctrl-C stops at once, without a checkpoint. A SIGTERM ends the process
    with status 143; so does SLURM's warning, SIGUSR1, and the job is requeued once the checkpoint is written.
    Lightning's own handlers are set aside meanwhile: that of SIGTERM calls a collective inside the handler, and ranks
    that are in another one then wait for each other for ever; that of SIGUSR1 saves in the middle of a batch. Behind
    the last batch, and once this has stopped the run, a signal does what it did before the run. A single process that
    has lost its rollout servers saves there too, as of its last finished window.
    """

    def __init__(self) -> None:
        self._asked = self._terminated = self._requeue = False
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, preemption.REQUEUE_SIGNAL)
        self._before = {number: signal.getsignal(number) for number in numbers}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._asked = self._terminated = self._requeue = False
        handlers = {signal.SIGINT: self._ask, signal.SIGTERM: self._terminate}
        if preemption.in_slurm_job():
            handlers[preemption.REQUEUE_SIGNAL] = self._warn
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # One rank may have heard the signal before the others; they must all stop behind the same batch.
        if trainer.strategy.reduce_boolean_decision(self._asked or self._terminated, all=False):
            log_batch(trainer)
            save(trainer, _path(trainer))
            if trainer.strategy.reduce_boolean_decision(self._requeue, all=False):
                preemption.requeue_job()
                trainer.strategy.barrier("requeue")  # a rank that ended meanwhile would be taken for dead
            raise KeyboardInterrupt if self._asked else SIGTERMException(128 + signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        # Its weights are sound. Several ranks would not meet here, and saving is a collective.
        if isinstance(exception, ServersLost) and trainer.world_size == 1:
            save(trainer, _path(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            _path(trainer).unlink(missing_ok=True)  # a finished run has its own last checkpoint

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nfinishing this batch, then saving a checkpoint; once more stops at once", flush=True)

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = True

    def _warn(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = self._requeue = True

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _path(trainer: Trainer) -> Path:
    checkpoints = trainer.checkpoint_callback
    folder = getattr(checkpoints, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
    return Path(folder) / FILE_NAME
