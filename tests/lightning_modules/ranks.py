"""Several gloo processes on this machine, forked, so that none of them imports anything again."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

TIMEOUT = 120.0  # seconds


def run_ranks(world_size: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns (plain values) in each of `world_size` processes, to which Lightning finds itself started as
    by torchrun. One that fails or hangs fails the test; its traceback is in the error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_be_rank, args=(rank, world_size, port, work, sender), daemon=True))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    deadline = time.monotonic() + TIMEOUT
    try:
        results: dict[int, Any] = {}
        while len(results) < world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, max(deadline - time.monotonic(), 0.0))  # the first that fails makes others wait
            assert ready, f"hanging: ranks {sorted(set(range(world_size)) - set(results))} of {world_size}"
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    failed, results[rank] = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} of {world_size} ended without a result") from None
                assert not failed, f"rank {rank} of {world_size}:\n{results[rank]}"
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _be_rank(rank: int, world_size: int, port: int, work: Callable[[], Any], sender: Any) -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # says where it hangs, and ends it without its parent too
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        sender.send((False, work()))
    except BaseException:
        sender.send((True, traceback.format_exc()))
    os._exit(0)
