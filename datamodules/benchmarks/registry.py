"""The benchmarks by name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from datamodules.benchmarks import blink, lisa, mig_bench, mmiu, odinw, ref_l4, revos
from datamodules.benchmarks.base import Benchmark

# In the order of the paper's tables. Each module has NAME, FOLDER, RULE, OFFICIAL and load(root) -> Benchmark.
BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module for module in (mig_bench, ref_l4, lisa, revos, odinw, blink, mmiu)
}


def benchmark_names(asked: str) -> list[str]:
    """The benchmarks named in "all" or "ref_l4,blink". Raises ValueError for an unknown name."""
    names = list(BENCHMARKS) if asked == "all" else [name.strip() for name in asked.split(",") if name.strip()]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise ValueError(f"bench={asked!r} must be all or some of {', '.join(BENCHMARKS)} with commas between")
    return names


def load_benchmark(name: str, data_root: str | Path) -> Benchmark:
    """Read <data_root>/<folder of the benchmark>. FileNotFoundError says which file is missing."""
    module = BENCHMARKS[name]
    return module.load(Path(data_root) / module.FOLDER)
