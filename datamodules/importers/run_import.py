"""Convert records to shards: in several processes, in a fixed order, and resumable at any time.

Shard k contains only the k-th range of records, so the files do not depend on the number of processes or on
interruptions. Each finished shard has a note in `.parts/`, so that a resumed run does not make it again.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.images.image_files import Frame
from datamodules.importers.reading.image_bytes import load_images
from datamodules.importers.reading.source import Convert, DataError, name_record
from datamodules.importers.tally import Tally
from datamodules.persistence.files import read_json, write_json
from datamodules.persistence.processes import end_with_parent, process_pool
from datamodules.persistence.progress_lines import Counted
from datamodules.samples.sample import BoxAnswer, LoadedSample, SampleError
from datamodules.streaming.manifest import write_manifest
from datamodules.streaming.shard_writer import ShardFile

PARTS = ".parts"
MIN_JUDGED = 500  # number of samples before the share of rejected samples is checked


@dataclass(frozen=True)
class Settings:
    """The number of samples, their order, the size of shards, and the allowed share of rejected samples."""

    count: int | None = None  # samples wanted, drawn at random by `seed`; None: all, in file order
    seed: int = 0
    records_per_shard: int = 1000
    # a larger share of rejected samples stops the import, because the format has probably changed
    max_rejected: float = 0.2
    # reject answers with several boxes ("several_answers"), which only data.answer_form=named_image trains on
    one_box: bool = False


@dataclass(frozen=True)
class _Task:
    folder: Path | None  # None: check the samples and write nothing
    number: int
    entries: Sequence[Any]
    convert: Convert
    image_root: Path
    one_box: bool
    frame: Frame | None = None  # that of the boxes
    limit: int | None = None  # largest number of samples


class Workers:
    """`with Workers(n) as workers`: n processes that make shards. With n = 1, this process makes them.

    Raises ProcessLost if a process has died, or was stopped for too long. Finished shards stay for the next run.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.pool: ProcessPoolExecutor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        if self.processes > 1:
            # Workers inherit no lock and no memory from this process. They are forked from a server process that has
            # already imported webdataset. webdataset imports torch, which takes seconds and hundreds of megabytes; this
            # way it is imported once.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["webdataset", __name__])
            pool = process_pool(self.processes, mp_context=context, initializer=end_with_parent)
            self.pool = self._stack.enter_context(pool)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self._stack.__exit__(*error)

    def submit(self, task: _Task) -> Future:
        if self.pool:
            return self.pool.submit(_make_shard, task)
        # One process: the same interface, but the work is done immediately.
        future: Future = Future()
        future.set_result(_make_shard(task))
        return future

    def in_order(self, tasks: Iterator[_Task]) -> Iterator[tuple[_Task, dict[str, Any]]]:
        """Yields tasks with their notes, in order.

        Only a few tasks run at a time, so memory does not grow with the number of records. If the generator is closed
        early, it waits for the running tasks.
        """
        waiting: deque[tuple[_Task, Future]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self.submit(task)))
                # Two tasks for each further worker keep all of them busy while this process waits for the oldest one.
                if len(waiting) > 2 * (self.processes - 1):
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
            wait(future for _, future in waiting)


def import_part(
    folder: Path | None,
    entries: Sequence[Any],
    convert: Convert,
    image_root: Path,
    settings: Settings,
    workers: Workers,
    title: str,
    frame: Frame | None = None,
) -> Tally:
    """Write one folder of shards and its manifest, and return the counts of taken and of rejected samples, by rule.

    Args:
        folder: folder of the shards. None: every record and image is checked, but nothing is written.
        entries: one entry for each record (`Scan.subsets`).
        convert: converts entries to samples; it runs in the workers.
        image_root: the folder to which the samples' image names are relative.
        settings: how many samples, their order, and the share that may be rejected.
        workers: the processes that make shards.
        title: title of the progress.
        frame: the frame of the boxes (`Scan.frame`).

    Raises:
        DataError: more than `max_rejected` of the samples break a rule, or there are fewer than `count`. Finished
            shards stay for the next run.
    """
    # 1. The amount of work: all records, or `count` samples.
    if folder is None:
        settings = replace(settings, count=None, max_rejected=1.0)
    else:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    tally, shards = Tally(), []
    total = len(entries) if settings.count is None else settings.count
    unit = "record" if settings.count is None else "sample"
    of_shards = enumerate(_entries_of_shards(entries, settings))
    tasks = (_Task(folder, k, chosen, convert, image_root, settings.one_box, frame) for k, chosen in of_shards)
    finished = workers.in_order(tasks)
    # 2. Make the shards, in order.
    with Counted(total, title, unit) as progress, closing(finished):
        for task, note in finished:
            missing = None if settings.count is None else settings.count - tally.samples
            # The last shard has too many samples, so it is made again with fewer.
            if missing is not None and note["samples"] > missing:
                note = workers.submit(replace(task, limit=missing)).result()
            tally.add(note)
            shards += [note["shard"]] if note.get("shard") else []
            progress.update(len(task.entries) if missing is None else note["samples"])
            _judge(title, tally, settings.max_rejected, at_least=MIN_JUDGED)
            if tally.samples == settings.count:
                break
    _judge(title, tally, settings.max_rejected, at_least=1)
    # 3. The final check, then the manifest. It is written last, when all shards exist.
    if settings.count is not None and tally.samples < settings.count:
        raise DataError(f"{title}: count={settings.count}, but only {tally.samples} usable samples are there\n{tally}")
    if folder is not None:
        _remove_strays(folder, {shard["name"] for shard in shards})
        write_manifest(folder, shards)
    return tally


def _entries_of_shards(entries: Sequence[Any], settings: Settings) -> Iterator[list[Any]]:
    """The entries of each shard: in file order, or in random order if only some of the samples are wanted."""
    order: Sequence[int] = range(len(entries))
    if settings.count is not None:
        # Records are shuffled, not samples, because the number of samples of a record is known only after its
        # conversion.
        order = list(order)
        random.Random(settings.seed).shuffle(order)
    size = settings.records_per_shard
    for start in range(0, len(order), size):
        yield [entries[index] for index in order[start : start + size]]


def forget_parts(folder: str | Path) -> None:
    """Remove the notes of a finished part."""
    shutil.rmtree(Path(folder) / PARTS, ignore_errors=True)


def _make_shard(task: _Task) -> dict[str, Any]:
    """Make one shard unless it exists, and return its note. Without a folder, the samples are only counted."""
    if task.folder is None:
        tally = Tally()
        for outcome in outcomes(task.entries, task.convert, task.image_root, task.frame, task.one_box):
            tally.count(outcome)
        return tally.to_json()
    note_file = task.folder / PARTS / f"{task.number:05d}.json"
    note = read_json(note_file)
    # A note is valid only with its shard; the file size shows whether the shard is complete.
    if note and task.limit in (None, note["limit"]) and _is_there(task.folder, note["shard"]):
        return note
    # removed first, because a note must never describe a shard that is being replaced
    note_file.unlink(missing_ok=True)
    tally, shard = Tally(), ShardFile(task.folder, task.number)
    with shard:
        for outcome in outcomes(task.entries, task.convert, task.image_root, task.frame, task.one_box):
            if tally.count(outcome):
                shard.add(outcome)
            if tally.samples == task.limit:
                break
    # The note is written after the shard is closed, because it means that the shard is complete.
    note = {"limit": task.limit, "shard": shard.entry, **tally.to_json()}
    write_json(note_file, note)
    return note


def outcomes(
    entries: Sequence[Any], convert: Convert, image_root: Path, frame: Frame | None = None, one_box: bool = False
) -> Iterator[LoadedSample | SampleError]:
    """Convert entries to samples with checked images; returns a result for each sample.

    Args:
        entries, convert, image_root, frame: from a `Scan`.
        one_box: whether answers with several boxes are rejected.
    """
    for made in convert(entries):
        if isinstance(made, SampleError):
            yield made
            continue
        sample = made.sample if isinstance(made, LoadedSample) else made
        try:
            if one_box and not isinstance(sample.answer, BoxAnswer):
                raise SampleError(sample.id, "several_answers", f"{type(sample.answer).__name__}")
            yield made if isinstance(made, LoadedSample) else load_images(made, image_root, frame)
        except SampleError as error:
            yield name_record(error, sample.extra.get("record"))


def _is_there(folder: Path, shard: dict[str, Any] | None) -> bool:
    path = folder / shard["name"] if shard else None
    return path is None or (path.is_file() and path.stat().st_size == shard["bytes"])


def _judge(title: str, tally: Tally, max_rejected: float, at_least: int) -> None:
    # Also checked early (MIN_JUDGED), so that a wrong format is not reported only after hours.
    seen = tally.samples + tally.rejected.total()
    if seen >= at_least and tally.rejected.total() > max_rejected * seen:
        raise DataError(
            f"{title}: {tally.rejected.total()} of {seen} samples rejected, more than max_rejected={max_rejected}: the"
            f" files are not as expected, or some are not here\n{tally}"
        )


def _remove_strays(folder: Path, names: set[str]) -> None:
    """Shards after the last one that was needed, and partial files of interrupted runs."""
    for path in [*folder.glob("shard-*.tar"), *folder.glob("shard-*.partial")]:
        if path.name not in names:
            path.unlink()
