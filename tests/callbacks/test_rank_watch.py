"""What a rank takes for the end of another, and what not; two ranks of this process with a real store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed

from callbacks.rank_watch import BEAT_SECONDS, KEY, Peers, RankWatch, _watch
from datamodules.persistence.processes import process_state

ROOT = Path(__file__).resolve().parents[2]
SILENCE = 5.0  # seconds: that many signs


@pytest.fixture
def peers() -> list[Peers]:
    """Two ranks that have heard each other."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Peers(store, rank, 2, SILENCE) for rank in range(2)]
    assert [peer.beat() for peer in [*ranks, ranks[0]]] == [None] * 3
    return ranks


def on_another_host(peer: Peers) -> None:
    peer.host = "elsewhere"
    assert peer.beat() is None


def test_a_silent_rank_on_another_host_is_dead(peers: list[Peers]) -> None:
    on_another_host(peers[1])
    faults = [peers[0].beat() for _ in range(8)]
    assert faults[:6] == [None] * 6, "as many signs as there are seconds, from the one that heard it on"
    assert "rank 1" in faults[-1] and "has given no sign for 7 s" in faults[-1]
    peers[1].beat()
    assert peers[0].beat() is None


def test_a_pause_of_all_ranks_is_no_silence(peers: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z, a suspended job, or a store that answered nobody for a while."""
    on_another_host(peers[1])
    assert peers[0].beat() is None
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 3600)
    assert peers[0].beat() is None


def test_a_silent_process_on_this_host_lives(peers: list[Peers]) -> None:
    """One that holds the interpreter's lock, or that a debugger holds."""
    assert [peers[0].beat() for _ in range(10)] == [None] * 10


def test_a_process_of_this_host_that_has_ended_is_named(peers: list[Peers]) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 60
    while not (fault := peers[0].beat()) and time.monotonic() < deadline:  # a zombie: nobody waits for it
        sign = {"host": peers[0].host, "pid": process.pid, "number": 9}
        peers[0].store.set(f"{KEY}/1", json.dumps(sign))
        time.sleep(0.05)
    assert f"rank 1 (process {process.pid}" in fault and "has ended" in fault
    process.wait()


def test_a_rank_that_never_gave_a_sign_is_not_missed() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    alone = Peers(store, 0, 2, SILENCE)
    assert [alone.beat() for _ in range(10)] == [None] * 10


def test_too_short_a_silence_is_refused() -> None:
    with pytest.raises(ValueError, match="silence_seconds=1"):
        RankWatch(silence_seconds=1)


def looked(peer: Peers, times: int) -> list[str | None]:
    """What is said at each of so many looks, a beat apart."""
    return [peer.look() for _ in range(times) if not peer.beat()]


def test_a_stopped_process_of_this_host_is_named_and_killed(peers: list[Peers]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    sign = {"host": peers[0].host, "pid": process.pid, "number": 9}
    peers[0].store.set(f"{KEY}/1", json.dumps(sign))
    process.send_signal(signal.SIGSTOP)
    while process_state(process.pid)[0] != "T":
        time.sleep(0.01)
    faults = looked(peers[0], 6)
    assert faults[:5] == [None] * 5
    assert f"rank 1 (process {process.pid}" in faults[5] and "was stopped (SIGSTOP) for 6 s" in faults[5]
    assert process.wait() == -signal.SIGKILL, "it would else hold its GPU, and the folder's lock"


def test_a_process_that_goes_on_in_time_is_not_given_up(peers: list[Peers]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    sign = {"host": peers[0].host, "pid": process.pid, "number": 9}
    peers[0].store.set(f"{KEY}/1", json.dumps(sign))
    try:
        for _ in range(3):
            process.send_signal(signal.SIGSTOP)
            while process_state(process.pid)[0] != "T":
                time.sleep(0.01)
            assert looked(peers[0], 4) == [None] * 4
            process.send_signal(signal.SIGCONT)
            while process_state(process.pid)[0] == "T":
                time.sleep(0.01)
            assert looked(peers[0], 2) == [None] * 2
    finally:
        process.kill()
        process.wait()


def test_a_store_that_answers_no_more_is_noticed_while_the_beat_waits_for_it(peers: list[Peers]) -> None:
    """As where the first rank, which holds the store, is stopped on another host."""
    assert looked(peers[1], 8) == [None] * 8, "it answers"
    faults = [peers[1].look() for _ in range(6)]
    assert faults[:5] == [None] * 5
    assert "rank 0 or its launcher gives no answer for 6 s" in faults[5]


def test_a_stopped_rank_is_killed_whatever_ends_this_one(
    peers: list[Peers], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The silence of its store may be noticed a moment before its state: it must not be left behind with its lock."""
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    stopped, running = children
    for rank, child in ((0, stopped), (2, running)):
        peers[1].known[rank] = {"host": peers[1].host, "pid": child.pid, "number": 9}
    monkeypatch.setattr(os, "_exit", sys.exit)
    try:
        stopped.send_signal(signal.SIGSTOP)
        while process_state(stopped.pid)[0] != "T":
            time.sleep(0.01)
        with pytest.raises(SystemExit):
            _watch(lambda: "rank 0 gives no answer", peers[1], threading.Event())
        assert stopped.wait() == -signal.SIGKILL and running.poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()
    told = (
        f"rank 0 gives no answer; rank 0 (process {stopped.pid} on {peers[1].host}) was stopped (SIGSTOP) and is killed"
    )
    assert told in capsys.readouterr().err


def test_the_thread_that_finds_a_fault_first_tells_it(
    peers: list[Peers], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The other thread finds that the stopped rank, which the first one has killed, has ended."""
    killed, looked_again, stop = threading.Event(), threading.Event(), threading.Event()
    main = threading.current_thread()

    def kill_stopped() -> list[str]:
        if threading.current_thread() is second:
            return []
        killed.set()
        looked_again.wait(60)
        second.join(0.2)  # without a lock it tells its fault now
        return ["rank 1"]

    def look() -> str:
        killed.wait(60)
        looked_again.set()
        return "rank 1 has ended"

    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status) if threading.current_thread() is main else None)
    monkeypatch.setattr(peers[0], "kill_stopped", kill_stopped)
    second = threading.Thread(target=_watch, args=(look, peers[0], stop), daemon=True)
    second.start()
    with pytest.raises(SystemExit):
        _watch(lambda: "rank 1 was stopped", peers[0], threading.Event())
    told = capsys.readouterr().err
    assert told.startswith("\nrank 1 was stopped; rank 1 was stopped (SIGSTOP) and is killed: rank 0 ends too")
    stop.set()
    peers[0].telling.release()  # the process lives on in this test
    second.join(60)


RANK = """
import sys, torch
from types import SimpleNamespace
from callbacks.rank_watch import RankWatch
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
RankWatch(silence_seconds=5.0).setup(SimpleNamespace(world_size=2, global_rank=rank), None, "fit")
print("up", flush=True)
while True:
    torch.distributed.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow, id="0, which holds the store")])
def test_a_rank_waiting_in_a_collective_for_a_stopped_one_ends(stopped: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), port], **streams) for rank in range(2)]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "up\n", rank.stderr.read()
        time.sleep(3 * BEAT_SECONDS)  # they have heard each other
        ranks[stopped].send_signal(signal.SIGSTOP)
        told = ranks[1 - stopped].communicate(timeout=60)[1]
        assert f"rank {stopped} (process {ranks[stopped].pid}" in told and "was stopped (SIGSTOP)" in told
        assert f"rank {1 - stopped} ends too" in told and ranks[1 - stopped].returncode == 1
        assert ranks[stopped].wait(timeout=60) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
