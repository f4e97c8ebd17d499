"""MIG-Bench's questions shared by several processes: a GPU each, or on a CPU a part of the cores.

The process that was started asks its share and hands each other process its own, which journals its answers beside the
first one's, in predictions-rank1.jsonl, …; in the end they are joined. Windows of questions that share batches are the
same however many processes there are, so answers do not depend on it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from callbacks.evaluation import EvaluationSettings
from callbacks.mig_bench import evaluate_mig_bench, question_windows
from datamodules.benchmarks.mig_bench import load_images
from datamodules.encoding.encoder import Encoder
from datamodules.metrics.mig_scoring import Prediction
from datamodules.persistence.files import Journal, read_journal, read_json, remove_journal
from datamodules.persistence.processes import ChildWatch, ProcessLost, end_with_parent
from datamodules.samples.sample import Sample
from experiments.evaluation.ask_processes import share_cores
from experiments.evaluation.choose_predictor import choose_device, make_engine
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.serving.generation_rules import Generation

OTHERS = "predictions-rank{}.jsonl"  # journals of the other processes, by rank; the first has predictions.jsonl


@dataclass(frozen=True)
class Asking:
    """Who is asked, and how: enough for any process. `form` are the arguments of `Encoder` on prompts and limits."""

    model: str
    dtype: str
    device: str
    form: dict[str, Any]
    image_root: str
    decoding: EvaluationSettings
    generation: Generation = "greedy"

    def policy(self, rank: int) -> QwenVL:
        return QwenVL(self.model, dtype=self.dtype).to(choose_device(self.device, rank)).eval()

    def encoder(self) -> Encoder:
        limit = self.decoding.max_new_tokens
        return Encoder(self.model, with_target=False, max_completion_tokens=limit, **self.form)

    def answer(
        self,
        policy: QwenVL,
        encoder: Encoder,
        samples: Sequence[Sample],
        journal: Journal,
        show_progress: bool = True,
    ) -> list[Prediction]:
        load = partial(load_images, image_root=self.image_root)
        engine = make_engine(policy, self.generation)
        return evaluate_mig_bench(policy, engine, encoder, samples, load, self.decoding, journal, show_progress)


class OtherProcesses:
    """`count` processes that load their libraries at once and wait for their shares. They end with this one."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(count)]
        self._pipes = [here for here, _ in ends]
        self._workers = [
            context.Process(target=_work, args=(there, rank, count + 1), daemon=True)
            for rank, (_, there) in enumerate(ends, 1)
        ]
        self._watch = ChildWatch(lambda: [worker.pid for worker in self._workers])

    def __enter__(self) -> OtherProcesses:
        for worker in self._workers:
            worker.start()
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)
        for worker in self._workers:
            worker.kill()  # a stopped process does not react to `terminate`
            worker.join()

    @property
    def count(self) -> int:
        return len(self._workers)

    def ask(self, asking: Asking, shares: Sequence[Sequence[Sample]], folder: Path, key: str) -> None:
        for pipe, samples in zip(self._pipes, shares, strict=True):
            with suppress(ConnectionError):  # it has ended, before it was asked: `wait` says how
                pipe.send((asking, samples, folder, key))

    def wait(self) -> None:
        """Return when all have answered. Raises ProcessLost if a process has failed; its answers are kept."""
        for worker in self._workers:
            worker.join()
        failed = [(rank, worker) for rank, worker in enumerate(self._workers, 1) if worker.exitcode != 0]
        if failed:
            told = [f"process {rank} {self._watch.fate(w.pid, w.exitcode)}" for rank, w in failed]
            raise ProcessLost(f"of {len(self._workers) + 1} processes that ask MIG-Bench, {'; '.join(told)}")


def answer_all(
    asking: Asking,
    policy: QwenVL,
    encoder: Encoder,
    samples: Sequence[Sample],
    folder: Path,
    key: str,
    others: OtherProcesses,
) -> list[Prediction]:
    """One prediction for each sample, in the order of `samples`, all in predictions.jsonl in `folder`."""
    journal = joined_journal(folder, key)
    if others.count:
        done = {record["id"] for record in journal.records}
        windows = question_windows((sample for sample in samples if sample.id not in done), asking.decoding)
        mine, *theirs = (list(chain(*windows[rank :: others.count + 1])) for rank in range(others.count + 1))
        others.ask(asking, theirs, folder, key)
        asking.answer(policy, encoder, mine, journal)
        others.wait()
        journal = joined_journal(folder, key)  # of all samples: what follows asks nothing and puts them in order
    return asking.answer(policy, encoder, samples, journal, show_progress=not others.count)


def joined_journal(folder: Path, key: str) -> Journal:
    """The evaluation's journal, with what other processes have answered in it, now or before a kill."""
    journal = Journal(folder / "predictions.jsonl", key)
    files = sorted(folder.glob(OTHERS.format("*")))
    known = {record["id"] for record in journal.records}
    found = {record["id"]: record for file in files for record in read_journal(file, key)}
    journal.append(record for name, record in found.items() if name not in known)
    for file in files:
        remove_journal(file)
    return Journal(journal.path, key) if files else journal


def set_answers_aside(folder: Path) -> None:
    """Rename the evaluation's journal to predictions.before.jsonl, with what other processes have answered in it."""
    answers = folder / "predictions.jsonl"
    if (key := read_json(answers.with_name(answers.name + ".key")).get("key")) is not None:
        joined_journal(folder, key)
    if answers.is_file():
        answers.replace(folder / "predictions.before.jsonl")
    remove_journal(answers)


def _work(pipe: Connection, rank: int, processes: int) -> None:
    end_with_parent()  # whoever starts again asks the rest
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, and with it this one
    share_cores(processes)
    asking, samples, folder, key = pipe.recv()
    if samples:
        journal = Journal(folder / OTHERS.format(rank), key)
        asking.answer(asking.policy(rank), asking.encoder(), samples, journal, show_progress=False)
