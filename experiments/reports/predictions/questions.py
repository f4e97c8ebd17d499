"""The questions and images of a finished evaluation, if they are still on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.benchmarks.base import Benchmark
from datamodules.benchmarks.registry import load_benchmark
from datamodules.benchmarks.shard_folders import PREFIX


def load_questions(result: Mapping[str, Any]) -> tuple[Benchmark | None, str]:
    """(the benchmark of an evaluation's result.json, ""); (None, why) if its files cannot be read."""
    name, root = result["benchmark"], result["data_root"]
    try:
        return load_benchmark(root if name.startswith(PREFIX) else name, root), ""
    except (OSError, ValueError) as error:
        return None, f"the benchmark cannot be read ({str(error).splitlines()[0][:200]})"
