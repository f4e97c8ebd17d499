"""What a rank takes for the death of another, and what not; two ranks of this process with a real store."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch.distributed

from callbacks.rank_watch import KEY, Peers, RankWatch

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
    """One that is halted, in a debugger, or holds the interpreter's lock."""
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
