"""Ask the questions of several benchmarks in one or several processes, with one progress bar."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datamodules.benchmarks.base import limit_columns
from datamodules.benchmarks.registry import load_benchmark
from datamodules.persistence.processes import ChildWatch, ProcessLost, end_with_parent
from datamodules.persistence.progress_lines import Counted
from datamodules.persistence.user_error import UserError
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat
from experiments.evaluation.choose_predictor import PredictorSettings, make_predictor
from lightning_modules.predictors.ask import answers_folder, answers_key, ask_share

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """The task of every process."""

    settings: PredictorSettings
    names: tuple[str, ...]
    data_root: str
    home: str  # output folder of the evaluation
    limit: int | None


@dataclass(frozen=True)
class Asked:
    """A process has `count` more replies of a benchmark."""

    name: str
    count: int


@dataclass(frozen=True)
class Ended:
    """A process has finished its questions of this benchmark."""

    name: str
    key: str  # key of its answers
    box_format: BoxFormat
    answer_form: AnswerForm


def ask_all(job: Job, totals: Mapping[str, int], processes: int) -> Iterator[Ended]:
    """Ask all questions. Yields the last `Ended` of a benchmark when all processes have finished it.

    Args:
        job: the questions, and the model that answers them.
        totals: number of questions of each benchmark, for the progress bar.
        processes: number of processes that share the questions; with 1, this process asks.

    Raises the UserError of a process (its model cannot be used, its answers cannot be written), ProcessLost if a
    process was killed or was stopped for too long, and RuntimeError with the traceback of any other failure. The other
    processes are then ended.
    """
    events = _events(job, processes) if processes > 1 else ask_rank(job, 0, 1)
    ended: Counter[str] = Counter()
    with Counted(sum(totals.values()), next(iter(totals), "questions"), "question", is_stage=True) as progress:
        for event in events:
            if isinstance(event, Asked):
                progress.title = event.name
                progress.update(event.count)
            else:
                ended[event.name] += 1
                if ended[event.name] == processes:
                    progress.make_room()
                    yield event


def ask_rank(job: Job, rank: int, world_size: int) -> Iterator[Asked | Ended]:
    """Ask the part of one process. An answer is in the journal before it is reported here."""
    predictor = make_predictor(job.settings, rank)
    for name in job.names:
        benchmark = load_benchmark(name, job.data_root)
        key = answers_key(benchmark, predictor)
        folder = answers_folder(Path(job.home), benchmark.name, key)
        samples = limit_columns(benchmark.samples, job.limit)
        for count in ask_share(predictor, samples, benchmark, folder, key, rank, world_size):
            yield Asked(name, count)
        yield Ended(name, key, predictor.box_format, predictor.answer_form)


def _events(job: Job, processes: int) -> Iterator[Asked | Ended]:
    """Yields the messages of spawned processes until all have ended."""
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    workers = [context.Process(target=_work, args=(job, rank, processes, messages)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    try:
        with ChildWatch(lambda: [worker.pid for worker in workers]) as watch:
            while any(worker.is_alive() for worker in workers) or not messages.empty():
                try:
                    event = messages.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    _check_alive(workers, watch)
                    continue
                if isinstance(event, Exception):
                    raise event
                yield event
            _check_alive(workers, watch)
    finally:
        for worker in workers:
            worker.kill()  # a stopped process does not react to `terminate`
            worker.join()


def _check_alive(workers: list[Any], watch: ChildWatch) -> None:
    """Raise ProcessLost if a process has failed, because a killed process sends no message."""
    for rank, worker in enumerate(workers):
        if worker.exitcode not in (None, 0):
            how = watch.fate(worker.pid, worker.exitcode)
            raise ProcessLost(f"process {rank} of {len(workers)} {how}; the same command asks the rest")


def _work(job: Job, rank: int, world_size: int, messages: Any) -> None:
    """The main function of a spawned process. It sends the reports of `ask_rank`, or the error that ends it."""
    # With more threads than cores, all processes would be slow.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // world_size)))
    end_with_parent()  # the next run asks the remaining questions
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    try:
        for event in ask_rank(job, rank, world_size):
            messages.put(event)
    except UserError as error:
        messages.put(error)
    except Exception:
        messages.put(RuntimeError(f"process {rank} of {world_size} failed:\n{traceback.format_exc()}"))
