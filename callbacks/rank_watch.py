"""Ends a run of several processes when one of them has died or was stopped, saying which.

A process that is killed leaves the others waiting in a collective: for NCCL until the process group's timeout, half an
hour by default. Here each rank tells the others through the store of the process group that it is there. It works alike
under Lightning's own launcher, torchrun and SLURM, on one node and on many.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.persistence.processes import ENDED, StopClock, end_with_parent, process_state

BEAT_SECONDS = 1.0
KEY = "rank_watch"


def end_with_launcher() -> None:
    """Where this process is a rank that another one started, end it once that one is gone: before there is a process
    group, nothing else would. Rank 0 of Lightning's own launcher was started by the user, who may leave."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(delay=3 * BEAT_SECONDS)  # the watch below, which knows more, speaks first


class RankWatch(Callback):
    """Two threads in each rank. On the same host a rank counts as dead once its process is gone, or was stopped
    (SIGSTOP) for `silence_seconds`; on another, after as long without a sign; and where the first rank, or torchrun,
    answers no more for as long, that one does. Then every rank says so and ends with status 1; the same command goes on
    from the last checkpoint. A stopped process of this host is killed: it would else hold its GPU and its lock.
    A rank that fails prints its own error first. List it first: rejection sampling comes in setup.
    """

    def __init__(self, silence_seconds: float = 30.0) -> None:
        if silence_seconds < 5 * BEAT_SECONDS:
            raise ValueError(f"silence_seconds={silence_seconds} must be at least {5 * BEAT_SECONDS}")
        self.silence_seconds = silence_seconds
        self._stop = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.world_size > 1 and torch.distributed.is_initialized():
            # A connection of its own: the process group's is taken while it waits.
            store = torch.distributed.distributed_c10d._get_default_store().clone()
            peers = Peers(store, trainer.global_rank, trainer.world_size, self.silence_seconds)
            peers.beat()  # a first sign, before anything that can kill a rank: one that never gave any is not missed
            self._stop = threading.Event()
            for look in (peers.beat, peers.look):  # apart: the first waits for as long as the store is silent
                threading.Thread(target=_watch, args=(look, peers.rank, self._stop), name=KEY, daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Behind every callback's on_fit_end, where the model is merged and evaluated.
        self._stop.set()
        trainer.strategy.barrier(KEY)  # no rank ends while another still watches it

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1 and isinstance(exception, RuntimeError):
            time.sleep(3 * BEAT_SECONDS)  # a broken collective: the watch, which knows by whom, ends this process
        self._stop.set()


def _watch(look: Callable[[], str | None], rank: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        fault = look()
        if fault and not stop.is_set():
            message = f"{fault}: rank {rank} ends too; the same command goes on from the last checkpoint"
            print(f"\n{message}", file=sys.stderr, flush=True)
            os._exit(1)


class Peers:
    """What a rank knows of the others.

    Silence is counted in signs that this rank gave meanwhile, not by the clock: while all are halted (Ctrl-Z, a
    suspended job) none is dead.
    """

    def __init__(self, store: Any, rank: int, world_size: int, silence_seconds: float) -> None:
        self.store, self.rank, self.silence_seconds = store, rank, silence_seconds
        self.host = _host()
        self.others = [other for other in range(world_size) if other != rank]
        self.heard: dict[int, tuple[int, int]] = {}  # rank -> its last number, and this rank's when it was new
        self.known: dict[int, dict[str, Any]] = {}
        self.number = 0
        self.clock = StopClock(silence_seconds)
        self._seen = 0, 0  # the last number that was looked at, and looks since

    def beat(self) -> str | None:
        """Give a sign, look for the others'; says who is gone."""
        self.number += 1
        try:
            sign = {"host": self.host, "pid": os.getpid(), "number": self.number}
            self.store.set(f"{KEY}/{self.rank}", json.dumps(sign))
            present = [other for other in self.others if self.store.check([f"{KEY}/{other}"])]
            signs = self.store.multi_get([f"{KEY}/{other}" for other in present]) if present else []
        except RuntimeError as error:  # the first rank, or torchrun, holds the store
            gone = [fault for other in self.known if (fault := self._gone(other))]
            return gone[0] if gone else f"rank 0 or its launcher is gone ({str(error).splitlines()[0]})"
        for other, text in zip(present, signs, strict=True):
            self.known[other] = json.loads(text)
            number = self.known[other]["number"]
            if other not in self.heard or self.heard[other][0] != number:
                self.heard[other] = number, self.number
        return next((fault for other in present if (fault := self._gone(other))), None)

    def look(self) -> str | None:
        """Says who was stopped: of the processes of this host by their state, of the first rank or its launcher by the
        store that it holds. Call it once a BEAT_SECONDS, from another thread than `beat`, which such a store holds up.
        """
        for other, sign in list(self.known.items()):
            if sign["host"] == self.host and (fault := self.clock.fault(sign["pid"], process_state(sign["pid"])[0])):
                with suppress(ProcessLookupError):
                    os.kill(sign["pid"], signal.SIGKILL)
                return f"{_name(other, sign)} {fault} and is killed"
        number, looks = self._seen
        self._seen = self.number, looks + 1 if number == self.number else 0
        silence = self._seen[1] * BEAT_SECONDS
        return f"rank 0 or its launcher gives no answer for {silence:.0f} s" if silence > self.silence_seconds else None

    def _gone(self, other: int) -> str | None:
        sign, silence = self.known[other], (self.number - self.heard[other][1]) * BEAT_SECONDS
        name = _name(other, sign)
        if sign["host"] == self.host:
            return f"{name} has ended" if process_state(sign["pid"])[0] in ENDED else None
        return f"{name} has given no sign for {silence:.0f} s" if silence > self.silence_seconds else None


def _name(rank: int, sign: dict[str, Any]) -> str:
    return f"rank {rank} (process {sign['pid']} on {sign['host']})"


def _host() -> str:
    """Name of this machine, with its boot's id where there is one: two containers may have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8] if boot.exists() else ''}{namespace[4:]}"
