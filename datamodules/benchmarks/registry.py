"""Look up benchmarks by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from datamodules.benchmarks import blink, lisa, mc_bench, mig_bench, mmiu, odinw, ref_l4, revos, shard_folders
from datamodules.benchmarks.base import Benchmark, Rule

# In the order of the paper's tables: these are "all". Each module has NAME, FOLDER, RULE, OFFICIAL, AVERAGES and
# load(root) -> Benchmark.
PAPER = (mig_bench, ref_l4, lisa, revos, odinw, blink, mmiu)
# MC-Bench has other questions (several boxes in two images) and another measure than the tables of the paper.
BENCHMARKS: dict[str, ModuleType] = {module.NAME: module for module in (*PAPER, mc_bench)}


def benchmark_names(asked: str) -> list[str]:
    """The names in "all" (the benchmarks of the paper's tables) or in a list such as "ref_l4,blink,data/kites/val".

    A path is a folder of shards. Raises ValueError for an unknown name.
    """
    paper = [module.NAME for module in PAPER]
    names = paper if asked == "all" else [name.strip() for name in asked.split(",") if name.strip()]
    unknown = [name for name in names if not is_benchmark(name)]
    if unknown or not names:
        known = ", ".join(BENCHMARKS)
        raise ValueError(f"bench={asked!r} must be all or some of {known}, or folders of shards, with commas between")
    return names


def is_benchmark(name: str) -> bool:
    """Whether `load_benchmark` accepts this name: the name of a benchmark, or the path of a folder of shards."""
    return name in BENCHMARKS or shard_folders.is_shards(name)


def load_benchmark(name: str, data_root: str | Path) -> Benchmark:
    """Read <data_root>/<folder of the benchmark>, or the folder of shards at the path `name`."""
    if shard_folders.is_shards(name):
        return shard_folders.load(name)
    module = BENCHMARKS[name]
    return module.load(Path(data_root) / module.FOLDER)


def benchmark_rules(name: str, columns: Iterable[str]) -> tuple[Rule, Rule, Mapping[str, tuple[str, ...]]]:
    """(rule, official rule, averages) of a benchmark by the name in its result. Raises ValueError for an unknown name.

    Args:
        name: name of a benchmark, or of shards ("shards-kites-val").
        columns: the columns of its questions. For shards, only the answers tell the columns.
    """
    if name.startswith(shard_folders.PREFIX):
        return shard_folders.RULE, shard_folders.OFFICIAL, shard_folders.averages(tuple(sorted(set(columns))))
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark={name!r} is none of {', '.join(BENCHMARKS)}")
    module = BENCHMARKS[name]
    return module.RULE, module.OFFICIAL, module.AVERAGES
