"""How well fetching hides behind training, what a million samples cost, and how fast samples are read, beside an
earlier version: numbers to report, not asserted.

python -m tests.datamodules.streaming.measure_streaming wait
python -m tests.datamodules.streaming.measure_streaming million
python -m tests.datamodules.streaming.measure_streaming read OTHER_CHECKOUT [TURNS]
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from datamodules.samples.rejections import Rejections
from datamodules.streaming.epoch_order import EpochOrder
from datamodules.streaming.remote_cache import CacheSettings
from datamodules.streaming.resumable_loader import BatchLoader
from datamodules.streaming.shard_reader import ShardReader
from datamodules.streaming.shard_writer import ShardWriter
from datamodules.streaming.stream import ShardStream
from tests.datamodules.encoding.tiny_processor import make_sample
from tests.datamodules.importers.published import jpeg
from tests.datamodules.streaming.shard_server import ShardServer

RATE = 20e6  # bytes a second that the server gives
NUM_SAMPLES, PER_SHARD, SAMPLE_BYTES = 4000, 100, 100_000
NUM_READ = 400  # samples of three images of COCO's usual size
BATCH, STEP = 8, 0.06  # samples and seconds of a step: 13 MB/s are needed


def wait_share() -> None:
    """Waiting for data as a share of the steps' time, from a server of 20 MB/s."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "served"
        rng = random.Random(0)
        with ShardWriter(folder, PER_SHARD) as writer:
            for index in range(NUM_SAMPLES):
                sample = make_sample(f"s{index}", ((14, 14), (28, 14)))
                writer.add(replace(sample, images=tuple(rng.randbytes(SAMPLE_BYTES // 2) for _ in sample.images)))
        need = BATCH * SAMPLE_BYTES / STEP / 1e6
        print(f"server {RATE / 1e6:g} MB/s; a step of {STEP * 1e3:g} ms needs {need:.1f} MB/s; {NUM_SAMPLES:,} samples")
        for order, buffer, share, workers in (
            ("block", 200, 0.0, 0),
            ("block", 200, 1.1, 0),
            ("block", 200, 0.5, 0),
            ("buffer", 200, 1.1, 0),
            ("block", 200, 0.0, 2),
            ("block", 200, 0.5, 2),
        ):
            with served(folder) as (url, sent), tempfile.TemporaryDirectory() as cache:
                settings = CacheSettings(cache, share * NUM_SAMPLES * SAMPLE_BYTES / 2**30)
                reader = ShardReader(url, cache=settings) if share else ShardReader(str(folder))
                ahead = reader.fetching_ahead if share else None
                stream = ShardStream(reader, lambda x: x, 0, 0, 1, buffer, ahead, order=order)
                waits = train(BatchLoader(stream, BATCH, workers, Rejections()), num_epochs=2)
                per_epoch = len(waits) // 2
                behind = waits[20:per_epoch]
                print(
                    f"order {order} of {buffer}, {f'cache {share:.0%} of the data' if share else 'local'}, {workers}"
                    f" workers: first batch"
                    f" {waits[0]:.2f} s; waiting {sum(behind) / len(behind) / STEP:.2%} of a step behind the first 20,"
                    f" {sum(waits[per_epoch:]) / per_epoch / STEP:.2%} in the second epoch; longest"
                    f" {max(behind) * 1e3:.0f} ms; {sent() / 1e6:.0f} MB sent",
                    flush=True,
                )


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """A server in a process of its own: its URL, and the bytes that it has sent."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(folder, there), daemon=True)
    process.start()

    def sent() -> int:
        here.send(None)
        return here.recv()

    yield here.recv(), sent
    process.kill()


def serve(folder: Path, pipe: Connection) -> None:
    with ShardServer(folder, RATE) as server:
        pipe.send(server.url)
        while True:
            pipe.recv()
            pipe.send(server.num_bytes)


def train(loader: BatchLoader, num_epochs: int) -> list[float]:
    """Seconds of waiting for each batch; a step sleeps, as the CPU does while a GPU computes."""
    waits = []
    for _ in range(num_epochs):
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            waits.append(time.perf_counter() - began)
            loader.mark_trained(batch)
            time.sleep(STEP)
    return waits


def million(num_shards: int = 2000, per_shard: int = 500) -> None:
    """Start and memory over 1,000,000 samples in 2,000 shards: one tar under 2,000 names."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with ShardWriter(folder / "one", per_shard) as writer:
            for index in range(per_shard):
                writer.add(make_sample(f"s{index}", ((14, 14), (28, 14))))
        (entry,) = json.loads((folder / "one/manifest.json").read_text())["shards"]
        names = [f"shard-{k:05d}.tar" for k in range(num_shards)]
        for name in names:
            os.link(folder / "one/shard-00000.tar", folder / name)
        shards = [entry | {"name": name} for name in names]
        (folder / "manifest.json").write_text(
            json.dumps({"version": 1, "count": num_shards * per_shard, "shards": shards})
        )
        print(f"{num_shards * per_shard:,} samples in {num_shards:,} shards; at first {resident_mb():.0f} MB")
        for title, more in (("one source", {}), ("three sources by weight", {"weights": (0.7, 0.2, 0.1)})):
            began = time.perf_counter()
            reader = ShardReader(str(folder))
            spans = (1000, 600, 400) if more else reader.spans
            loader = BatchLoader(
                ShardStream(reader, lambda x: x, 0, spans=spans, **more), BATCH, 0, Rejections(), worker_seconds=60
            )
            batches = iter(loader)
            next(batches)
            print(f"{title}: first batch after {time.perf_counter() - began:.2f} s, {resident_mb():.0f} MB", flush=True)
            for part in range(4):
                began = time.perf_counter()
                for _ in range(2500):
                    next(batches)
                rate = 2500 * BATCH / (time.perf_counter() - began)
                print(
                    f"  {(part + 1) * 20_000:,} samples read, {rate:,.0f} a second, {resident_mb():.0f} MB", flush=True
                )
        began = time.perf_counter()
        EpochOrder(reader.starts, 0).numbers(1)
        print(f"the order of an epoch: {time.perf_counter() - began:.2f} s")


# CPU seconds in the checkout where it is started: all samples of a folder read in a shuffled order, read and decoded,
# and as batches of training.
READ = """
import random, sys, time
sys.path.insert(0, ".")
try:
    from datamodules.streaming.shard_reader import ShardReader
except ImportError:
    from datamodules.streaming.shards import ShardReader
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS, decode_images, open_images
reader = ShardReader(sys.argv[1])
numbers = list(range(reader.count))
random.Random(0).shuffle(numbers)

def read(is_decoded):
    began = time.process_time()
    for number in numbers:
        loaded = reader.read(number)
        if is_decoded:
            for _ in decode_images(loaded.sample.id, open_images(loaded, MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS)):
                pass
    return time.process_time() - began

read(True)  # hashes, indices and codecs
alone, decoded = read(False), read(True)

from datamodules.multi_image import MultiImageData
data = MultiImageData(sys.argv[1], sys.argv[2], batch_size=16, label_images=True, with_target=False)
loader = data.train_dataloader()

def train():
    began = time.process_time()
    for batch in loader:
        data.mark_trained(batch)
    return (time.process_time() - began) * len(numbers) / (16 * len(loader))

train()
print(alone, decoded, train())
"""


def read_beside(other: str, turns: int = 9) -> None:
    """Samples a CPU second here and in another checkout, in turns: the clock of a shared machine says little."""
    here = str(Path(__file__).resolve().parents[3])
    model = f"{here}/models/nano-base"
    with tempfile.TemporaryDirectory() as place:
        with ShardWriter(place, 250) as writer:
            for index in range(NUM_READ):
                sample = make_sample(f"s{index}", ((14, 14),) * 3)
                images = tuple(jpeg((index + k) % 7, (640, 480)) for k in range(3))
                writer.add(replace(sample, images=images))
        seconds: dict[str, list[tuple[float, ...]]] = {here: [], other: []}
        for turn in range(turns):
            for checkout in (here, other) if turn % 2 else (other, here):  # neither is always the first
                command = [sys.executable, "-c", READ, place, model]
                environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
                done = subprocess.run(
                    command, cwd=checkout, env=environment, capture_output=True, text=True, check=True
                )
                seconds[checkout].append(tuple(map(float, done.stdout.split())))
    for k, what in enumerate(("reading alone", "reading and decoding", "batches of training")):
        ours, theirs = ([each[k] for each in seconds[checkout]] for checkout in (here, other))
        rates = [NUM_READ / statistics.median(each) for each in (ours, theirs)]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(
            f"{what}: {rates[0]:,.0f} samples a CPU second here, {rates[1]:,.0f} there; median ratio of {turns} turns"
            f" {ratio:.3f}",
            flush=True,
        )


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    os.environ["no_proxy"] = "*"
    if sys.argv[1] == "read":
        read_beside(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        {"wait": wait_share, "million": million}[sys.argv[1]]()
