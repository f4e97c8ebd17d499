"""A folder of shards as a benchmark: any samples of one's own, asked and scored as MIG-Bench's questions are.

Every task is a column, whatever its name is, and "avg" is the mean of the columns. A sample whose answer is one box or
one choice is a question. Any other sample (several boxes, a damaged record) is left out, counted by rule and named.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datamodules.benchmarks.base import PAPER, Benchmark, Rule
from datamodules.samples.sample import BoxesAnswer, LoadedSample, Rejections, Sample, SampleError
from datamodules.streaming.manifest import MANIFEST

PREFIX = "shards-"  # of the names of such benchmarks
RULE = Rule(source=PAPER + ", mean over tasks")
OFFICIAL = Rule(source="shards have no official rule: the same as the other")
# Names beside the columns in result.json and in the logged metrics. A task of such a name gets another column.
TAKEN = ("avg", "acc_0.3", "acc_0.7", "mean_iou", "format_rate", "truncated_rate", "mean_tokens", "official_avg")


def is_shards(name: str) -> bool:
    """Whether the name of a benchmark is a path: it holds a slash, or is a folder with a manifest."""
    return "/" in name or Path(name, MANIFEST).is_file()


def shards_name(folder: str | Path) -> str:
    """The name of its results: "shards-kites-val" for data/kites/val."""
    return PREFIX + "-".join(Path(folder).absolute().parts[-2:])


def averages(columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The one average, over all columns."""
    return {"avg": columns}


def load(folder: str | Path) -> Benchmark:
    """The questions in a folder of shards. Raises ValueError for a folder without any."""
    from datamodules.streaming.shard_reader import ShardReader  # loads webdataset, which other benchmarks do without

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
    return Benchmark(shards_name(folder), tuple(samples), read, *rules, data=reader.fingerprint, dropped=named)


def _question(sample: Sample) -> Sample:
    """The sample with its column. Raises SampleError "several_answers" for several boxes."""
    if isinstance(sample.answer, BoxesAnswer):
        raise SampleError(sample.id, "several_answers", "the answer is neither one box nor a choice")
    # `extra` holds facts of the sample's source. A benchmark reads "column" and "size" there, which mean other things.
    column = f"{sample.task} (task)" if sample.task in TAKEN else sample.task
    return replace(sample, extra={"column": column})
