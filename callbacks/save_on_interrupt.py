"""Lose no work at Ctrl-C and SIGTERM: finish the batch and write a checkpoint, from which the same command resumes.

Other guards of a run: `PolicyModule` stops it at a loss that is not finite, and saves the sample ids;
`callbacks/checkpoints.py` makes sure that each checkpoint is complete or absent.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import preemption
from callbacks.checkpoints import INTERRUPTED, STEP, log_batch, num_updates, save
from lightning_modules.rollouts.vllm.server_pool import ServersLost


class SaveOnInterrupt(Callback):
    """At the end of the batch in which a signal came, saves <checkpoint folder>/interrupted.ckpt and stops.

    - Ctrl-C: the process ends by KeyboardInterrupt. A second Ctrl-C stops at once, without a checkpoint.
    - SIGTERM: the process ends with status 143.
    - SIGUSR1, SLURM's warning: as SIGTERM, and the job is requeued once the checkpoint is written.

    A single process that has lost its rollout servers also saves this checkpoint, at its last finished window.

    Lightning alone would stop at Ctrl-C in the middle of a batch, and its `save_on_exception` would also save weights
    that another error has damaged. Lightning's own signal handlers are replaced during training. Its handler for
    SIGTERM calls a collective operation; ranks that are in another collective at that moment would wait for each other
    forever. Its handler for SIGUSR1 saves in the middle of a batch. After the last batch, and after this callback has
    stopped the run, signals have the same effect as before the run.
    """

    def __init__(self) -> None:
        self._came: set[int] = set()  # signals
        self._before: dict[signal.Signals, Any] = {}  # the handlers from before the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the signal handlers, before Lightning sets its own."""
        numbers = (signal.SIGINT, signal.SIGTERM, preemption.REQUEUE_SIGNAL)
        self._before = {number: signal.getsignal(number) for number in numbers}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers. Ours only set flags."""
        self._came = set()
        for number in self._before:
            if number != preemption.REQUEUE_SIGNAL or preemption.in_slurm_job():
                signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """If a signal came, save and stop."""
        # A signal reaches the ranks at different times, but all must stop after the same batch.
        if trainer.strategy.reduce_boolean_decision(bool(self._came), all=False):
            log_batch(trainer)
            save(trainer, _path(trainer))
            if trainer.strategy.reduce_boolean_decision(preemption.REQUEUE_SIGNAL in self._came, all=False):
                preemption.requeue_job()
                trainer.strategy.barrier("requeue")  # RankWatch would report a rank that ends earlier as dead
            raise KeyboardInterrupt if signal.SIGINT in self._came else SIGTERMException(128 + signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers; save if the rollout servers are lost."""
        self._restore()
        # The weights are good. With several ranks, the others need not come here, and saving needs them all.
        if isinstance(exception, ServersLost) and trainer.world_size == 1:
            batches = trainer.fit_loop.epoch_loop.batch_progress.total
            if batches.ready > batches.completed and not getattr(pl_module, "window_is_open", False):
                log_batch(trainer)  # a resumed run does not repeat this batch
            save(trainer, _path(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint of an interruption: a finished run has its own last checkpoint.

        If the signal came in the very last batch, the run has no other one, and this becomes its last checkpoint.
        """
        if trainer.is_global_zero and (path := _path(trainer)).exists():
            last = path.with_name(f"{STEP}{trainer.global_step:08d}.ckpt")
            if num_updates(path) == trainer.global_step and not last.exists():
                path.rename(last)
            else:
                path.unlink()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """The handler of SIGINT, SIGTERM and SLURM's warning."""
        if signum == signal.SIGINT and signum in self._came:  # the second Ctrl-C
            raise KeyboardInterrupt
        self._came.add(signum)
        if signum == signal.SIGINT:
            print("\nfinishing this batch, then saving a checkpoint; once more stops at once", flush=True)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _path(trainer: Trainer) -> Path:
    """The path of the checkpoint, in the folder of the checkpoint callback."""
    checkpoints = trainer.checkpoint_callback
    folder = getattr(checkpoints, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
    return Path(folder) / INTERRUPTED
