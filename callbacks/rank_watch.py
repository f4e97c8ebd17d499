"""End a run of several processes when one of them has died or was stopped, with a message that names it.

If a process is killed, the others wait in a collective operation; with NCCL they wait until the process group's
timeout, half an hour by default. Here, each rank regularly writes a heartbeat into the store of the process group. This
works with Lightning's own launcher, torchrun and SLURM, on one node and on many.
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

from datamodules.persistence.problems import Problems
from datamodules.persistence.processes import ENDED, STOPPED, StopClock, end_with_parent, process_state

BEAT_SECONDS = 1.0  # time between two heartbeats, and between two checks
KEY = "rank_watch"  # prefix of keys in the store; name of threads and barriers


def end_with_launcher() -> None:
    """If another process has started this rank, end this rank when that process is gone.

    Before the process group exists, nothing else would end it. Rank 0 of Lightning's own launcher was started by the
    user, who may log out; it is left alone.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(delay=3 * BEAT_SECONDS)  # RankWatch knows more about the reason, so it may report first


class RankWatch(Callback):
    """Two threads in each rank, which watch the other ranks.

    A rank counts as dead in these cases:

    - on the same host: its process is gone, or was stopped (SIGSTOP) for `silence_seconds`
    - on another host: it has given no heartbeat for `silence_seconds`
    - rank 0 or torchrun, which holds the store: it has not answered for `silence_seconds`

    Then every rank prints the reason and ends with status 1; the same command resumes from the last checkpoint. A
    stopped process on the same host is killed, because it would keep its GPU and its lock. A rank that fails by itself
    prints its own error first.

    List this callback first: RejectionSampling works in `setup`, and must be watched too.

    Args:
        silence_seconds: see above.
    """

    def __init__(self, silence_seconds: float = 30.0) -> None:
        problems = Problems()
        problems.at_least(5 * BEAT_SECONDS, silence_seconds=silence_seconds)
        problems.raise_all("RankWatch")
        self.silence_seconds = silence_seconds
        self._stop = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the threads."""
        if stage == "fit" and trainer.world_size > 1 and torch.distributed.is_initialized():
            # The threads need their own connection: that of the process group is busy while a collective waits.
            store = torch.distributed.distributed_c10d._get_default_store().clone()
            peers = Peers(store, trainer.global_rank, trainer.world_size, self.silence_seconds)
            # The first heartbeat comes before anything that can kill a rank: without one, a dead rank is not noticed.
            peers.beat()
            self._stop = threading.Event()
            for look in (peers.beat, peers.look):  # two threads, because `beat` blocks while the store does not answer
                threading.Thread(target=_watch, args=(look, peers, self._stop), name=KEY, daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching, after `on_fit_end` of all callbacks, where the model is merged and evaluated."""
        self._stop.set()
        trainer.strategy.barrier(KEY)  # no rank may end while another one still watches it

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the threads time to report a dead rank; otherwise stop watching."""
        if trainer.world_size > 1 and isinstance(exception, RuntimeError):
            # A collective has failed, perhaps because a rank is dead. The threads know which, and end this process.
            time.sleep(3 * BEAT_SECONDS)
        self._stop.set()


def _watch(look: Callable[[], str | None], peers: Peers, stop: threading.Event) -> None:
    """The loop of a thread: call `look`, and end the process if it reports a dead rank."""
    while not stop.wait(BEAT_SECONDS):
        fault = look()
        if fault and not stop.is_set():
            # Never released: only the thread that finds a fault first tells it. The other one may find that a rank has
            # ended because this one has killed it.
            peers.telling.acquire()
            # Whatever the reason is: once this rank has ended, nobody else would end a stopped one.
            also = "".join(f"; {name} was stopped (SIGSTOP) and is killed" for name in peers.kill_stopped())
            message = f"{fault}{also}: rank {peers.rank} ends too; the same command goes on from the last checkpoint"
            print(f"\n{message}", file=sys.stderr, flush=True)
            os._exit(1)  # sys.exit would end only this thread; the main thread is stuck in a collective


class Peers:
    """The knowledge of one rank about the others.

    Silence is measured in this rank's own heartbeats, not in time. So no rank counts as dead while all ranks are
    paused (Ctrl-Z, a suspended job).

    Args:
        store: the store of the process group, through a connection of its own.
        rank: this rank.
        world_size: number of ranks.
        silence_seconds: a rank without a heartbeat for this time is dead.
    """

    def __init__(self, store: Any, rank: int, world_size: int, silence_seconds: float) -> None:
        self.store, self.rank, self.silence_seconds = store, rank, silence_seconds
        self.host = _host()
        self.others = [other for other in range(world_size) if other != rank]
        self.heard: dict[int, tuple[int, int]] = {}  # rank -> (number of its last heartbeat, our number when it came)
        self.known: dict[int, dict[str, Any]] = {}  # rank -> its last heartbeat: host, process id, number
        self.number = 0  # of this rank's last heartbeat
        self.clock = StopClock(silence_seconds)
        self.telling = threading.Lock()  # held by the thread that ends this process
        self._seen = 0, 0  # (our heartbeat number at the last `look`, number of looks since it changed)

    def beat(self) -> str | None:
        """Write a heartbeat and read those of the others; returns in words which rank is gone, or None."""
        self.number += 1
        # 1. Write and read.
        try:
            sign = {"host": self.host, "pid": os.getpid(), "number": self.number}
            self.store.set(f"{KEY}/{self.rank}", json.dumps(sign))
            present = [other for other in self.others if self.store.check([f"{KEY}/{other}"])]
            signs = self.store.multi_get([f"{KEY}/{other}" for other in present]) if present else []
        except RuntimeError as error:  # the store is gone: rank 0 or torchrun holds it
            gone = [fault for other in self.known if (fault := self._gone(other))]
            return gone[0] if gone else f"rank 0 or its launcher is gone ({str(error).splitlines()[0]})"
        # 2. Remember when each rank's heartbeat last changed.
        for other, text in zip(present, signs, strict=True):
            self.known[other] = json.loads(text)
            number = self.known[other]["number"]
            if other not in self.heard or self.heard[other][0] != number:
                self.heard[other] = number, self.number
        return next((fault for other in present if (fault := self._gone(other))), None)

    def look(self) -> str | None:
        """Find stopped processes; returns in words which rank it is, or None.

        Call this every BEAT_SECONDS, in another thread than `beat`: if the process with the store is stopped, `beat`
        blocks.
        """
        # 1. On this host: the system tells the state of a process. A stopped one is killed.
        for other, sign in list(self.known.items()):
            if sign["host"] == self.host and (fault := self.clock.fault(sign["pid"], process_state(sign["pid"])[0])):
                _kill(sign["pid"])
                return f"{_name(other, sign)} {fault} and is killed"
        # 2. The process with the store, on any host: `beat` has not returned since several looks.
        number, looks = self._seen
        self._seen = self.number, looks + 1 if number == self.number else 0
        silence = self._seen[1] * BEAT_SECONDS
        return f"rank 0 or its launcher gives no answer for {silence:.0f} s" if silence > self.silence_seconds else None

    def kill_stopped(self) -> list[str]:
        """Kill the ranks on this host that are stopped at this moment; returns their names."""
        stopped = [
            (other, sign)
            for other, sign in list(self.known.items())
            if sign["host"] == self.host and process_state(sign["pid"])[0] == STOPPED
        ]
        for _, sign in stopped:
            _kill(sign["pid"])
        return [_name(other, sign) for other, sign in stopped]

    def _gone(self, other: int) -> str | None:
        """Describes a rank that is gone, or None. This host: by its process; other hosts: by its silence."""
        sign, silence = self.known[other], (self.number - self.heard[other][1]) * BEAT_SECONDS
        name = _name(other, sign)
        if sign["host"] == self.host:
            return f"{name} has ended" if process_state(sign["pid"])[0] in ENDED else None
        return f"{name} has given no sign for {silence:.0f} s" if silence > self.silence_seconds else None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself a moment ago
        os.kill(pid, signal.SIGKILL)


def _name(rank: int, sign: dict[str, Any]) -> str:
    return f"rank {rank} (process {sign['pid']} on {sign['host']})"


def _host() -> str:
    """A name of this machine and its process namespace. The host name alone is not enough: two containers may share it.

    Two processes with the same name can see each other's state in /proc.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8] if boot.exists() else ''}{namespace[4:]}"
