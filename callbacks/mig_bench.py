"""Measure MIG-Bench before, during and after a phase of training."""

from __future__ import annotations

from typing import Any

from callbacks.benchmark_evaluation import BenchmarkEvaluation
from datamodules.benchmarks import mig_bench
from datamodules.benchmarks.base import Benchmark
from datamodules.persistence.problems import Problems


class MIGBench(BenchmarkEvaluation):
    """`BenchmarkEvaluation` for a file in MIG-Bench's format. The file may hold the user's own validation questions.

    Args:
        annotations: path of MIG_data.json.
        image_root: the folder that contains "MIG-Bench/"; the image names in the file begin with "MIG-Bench/".
        validation_limit_per_task: number of questions of each task inside training.
        settings: the other arguments of `BenchmarkEvaluation`.
    """

    def __init__(self, annotations: str, image_root: str, validation_limit_per_task: int = 20, **settings: Any) -> None:
        problems = Problems()
        problems.positive(validation_limit_per_task=validation_limit_per_task)
        problems.raise_all("MIGBench")
        super().__init__(mig_bench.NAME, image_root, limit=validation_limit_per_task, **settings)
        self.annotations, self.image_root = annotations, image_root

    def load(self) -> Benchmark:
        """The questions of `annotations`."""
        return mig_bench.load_files(self.annotations, self.image_root)
