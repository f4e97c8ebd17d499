"""MIG-Bench as one of the seven benchmarks. Its files and target images are read in `mig_bench.py`."""

from __future__ import annotations

from pathlib import Path

from datamodules.benchmarks.base import PAPER, Benchmark, Rule, file_benchmark
from datamodules.benchmarks.mig_bench import IN_DOMAIN, OUT_OF_DOMAIN, TASKS, load_mig_bench
from datamodules.benchmarks.upright import TURNED

NAME, FOLDER = "mig_bench", "MIG-Bench"
AVERAGES = {"avg": TASKS, "in_domain": IN_DOMAIN, "out_of_domain": OUT_OF_DOMAIN}
RULE = Rule(source=PAPER + ", mean over tasks")
OFFICIAL = Rule(source="Migician eval/utils.py: its own box reader, IoU >= 0.5", inclusive=True, reader="mig_bench")


def load(root: Path) -> Benchmark:
    """`root` holds MIG_data.json and images/ and is itself named MIG-Bench, as the image names say."""
    samples, dirty = load_mig_bench(root / "MIG_data.json", root.parent)

    notes = {"kept: dirty answer box": len(dirty.boxes), TURNED: dirty.turned}
    notes = {reason: count for reason, count in notes.items() if count}
    # The file's boxes are in the stored frame; `load_mig_bench` has turned them already.
    return file_benchmark(NAME, samples, root.parent, RULE, OFFICIAL, AVERAGES, notes, frame="shown")
