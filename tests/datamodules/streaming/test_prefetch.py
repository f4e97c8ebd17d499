from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from datamodules.streaming.prefetch import prefetch

ROOT = Path(__file__).resolve().parents[3]


def prefetching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "did not happen within 30 s"
        time.sleep(0.001)


class Numbers:
    """0, 1, … up to `length`; knows how many were made, and where."""

    def __init__(self, length: int) -> None:
        self.length, self.made, self.threads = length, 0, set()

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.threads.add(threading.current_thread())
            self.made += 1
            yield number


@pytest.mark.parametrize("num_ahead", [1, 3, 50])
@pytest.mark.parametrize("length", [0, 1, 20])
def test_values_and_their_order_are_kept(length: int, num_ahead: int) -> None:
    numbers = Numbers(length)
    assert list(prefetch(numbers, num_ahead)) == list(range(length))
    assert threading.current_thread() not in numbers.threads and len(numbers.threads) <= 1
    assert not prefetching_threads()


@pytest.fixture
def three_threads() -> Iterator[None]:
    """PyTorch's number of threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="threads share their helpers without OpenMP")
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("depth", [1, 2])
def test_the_thread_computes_alone_and_all_others_as_before(depth: int) -> None:
    """OpenMP slows all down where threads have more helpers in all than there are cores."""
    values: Iterator[int] = (torch.get_num_threads() for _ in range(5))
    for _ in range(depth):  # also where one prefetching thread begins another
        values = prefetch(values, 1)
    assert [(next(values), torch.get_num_threads()) for _ in range(3)] == [(1, 3)] * 3
    assert ThreadPoolExecutor().submit(torch.get_num_threads).result() == 3


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_so_many_values_are_made_ahead_and_no_more(num_ahead: int) -> None:
    numbers = Numbers(100)
    values = prefetch(numbers, num_ahead)
    for taken in range(1, 6):
        next(values)
        wait_until(lambda taken=taken: numbers.made == taken + num_ahead)
        time.sleep(0.01)
        assert numbers.made == taken + num_ahead
    values.close()


def test_nothing_is_made_before_the_first_value_is_asked_for() -> None:
    numbers = Numbers(3)
    values = prefetch(numbers, 3)
    time.sleep(0.01)
    assert numbers.made == 0 and not prefetching_threads()
    values.close()


def test_an_error_comes_in_its_place_with_its_traceback() -> None:
    def broken_source() -> Iterator[int]:
        yield from range(2)
        raise RuntimeError("no third number")

    values = prefetch(broken_source(), 5)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(RuntimeError, match="no third number") as caught:
        next(values)
    assert "broken_source" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert list(values) == [] and not prefetching_threads()


def leave_early(values: Iterator[int]) -> None:
    for _ in values:
        break


def collect_in_a_cycle(values: Iterator[int]) -> None:
    next(values)
    cycle = [values]
    cycle.append(cycle)


@pytest.mark.parametrize("leave", [leave_early, collect_in_a_cycle])
def test_the_thread_ends_with_an_iterator_that_is_left(leave: Callable[[Iterator[int]], None]) -> None:
    numbers = Numbers(10**9)
    leave(prefetch(numbers, 4))
    gc.collect()
    assert not prefetching_threads()
    made = numbers.made
    time.sleep(0.01)
    assert numbers.made == made <= 6


def test_an_iterator_may_be_collected_by_its_own_thread() -> None:
    is_lost = threading.Event()

    def collecting_source() -> Iterator[int]:
        yield 0
        is_lost.wait(30)
        gc.collect()
        yield 1

    gc.disable()
    try:
        collect_in_a_cycle(prefetch(collecting_source(), 1))
        assert prefetching_threads()
        is_lost.set()
        wait_until(lambda: not prefetching_threads())  # and pytest reports what a finalizer raises
    finally:
        gc.enable()


def test_a_process_ends_with_an_iterator_left_open() -> None:
    lines = (
        "import itertools; from datamodules.streaming.prefetch import prefetch; values = prefetch(itertools.count(), 9)"
    )
    program = f"{lines}; print(next(values))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
