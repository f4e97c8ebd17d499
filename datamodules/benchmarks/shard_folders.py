"""A folder of shards as a benchmark: the user's own samples, asked and scored in the same way as MIG-Bench.

Every task is a column, and "avg" is the mean over the columns. Damaged records are skipped, counted by rule and
reported. An answer of several boxes is right if each true box has a written one in its image with an IoU above the
threshold, and no other box is written; F1 is reported beside this accuracy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datamodules.benchmarks.base import PAPER, Benchmark, Rule
from datamodules.samples.rejections import Rejections
from datamodules.samples.sample import LoadedSample, Sample, SampleError
from datamodules.streaming.manifest import MANIFEST

PREFIX = "shards-"  # first part of the names of such benchmarks
RULE = Rule(source=PAPER + ", mean over tasks")
OFFICIAL = Rule(source="shards have no official rule: the same as the other")
# result.json and the logged metrics use these names beside the columns. A task with such a name gets another column
# name.
TAKEN = ("avg", "acc_0.3", "acc_0.7", "mean_iou", "format_rate", "truncated_rate", "mean_tokens", "official_avg")


def is_shards(name: str) -> bool:
    """Whether the name of a benchmark is a path: it contains a slash, or is a folder with a manifest."""
    return "/" in name or Path(name, MANIFEST).is_file()


def shards_name(folder: str | Path) -> str:
    """The name of the results: "shards-kites-val" for data/kites/val."""
    return PREFIX + "-".join(Path(folder).absolute().parts[-2:])


def averages(columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The only average: "avg", over all columns."""
    return {"avg": columns}


def load(folder: str | Path) -> Benchmark:
    """The questions in a folder of shards. Raises ValueError if the folder has none."""
    from datamodules.streaming.shard_reader import ShardReader  # imports webdataset, which other benchmarks do not need

    reader = ShardReader(str(folder))
    samples, numbers, rejections = [], {}, Rejections()
    for number in range(reader.count):
        try:
            sample = _question(reader.read(number).sample)
        except SampleError as error:
            rejections.add(error)
            continue
        samples.append(sample)
        numbers[sample.id] = number

    def read(sample: Sample) -> LoadedSample:
        return LoadedSample(sample, reader.read(numbers[sample.id]).images)

    columns = tuple(sorted({sample.extra["column"] for sample in samples}))
    named = {f"{rule} ({', '.join(rejections.examples[rule])})": n for rule, n in rejections.counts.items()}
    rules = (RULE, OFFICIAL, averages(columns))
    facts = {"data": reader.fingerprint, "dropped": named, "image_counts": True}
    return Benchmark(shards_name(folder), tuple(samples), read, *rules, **facts)


def _question(sample: Sample) -> Sample:
    """The sample with its column."""
    # `extra` comes from the sample's source. There, "column" and "size" may have another meaning than in a benchmark.
    column = f"{sample.task} (task)" if sample.task in TAKEN else sample.task
    return replace(sample, extra={"column": column})
