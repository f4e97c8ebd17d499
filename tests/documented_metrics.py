"""The names that docs/metrics.md defines."""

from __future__ import annotations

import re
from pathlib import Path

from datamodules.benchmarks.mig_bench import TASKS
from lightning_modules.rl.rewards.reward_list import RewardList

METRICS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def documented_names() -> set[str]:
    """Every name in the first column of a table.

    `<task>` stands for each task of MIG-Bench, and `<name>` in `reward/<name>` for each reward of eq. 3. What is
    defined of `mig_bench/` holds for `mig_bench_val/` too, as the page says.
    """
    names: set[str] = set()
    for line in METRICS.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            names |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    names |= {name.replace("<task>", task) for name in names for task in TASKS}
    rewards = RewardList().names
    names |= {name.replace("<name>", own) for name in names if name.startswith("reward/") for own in rewards}
    return names | {name.replace("mig_bench/", "mig_bench_val/") for name in names if name.startswith("mig_bench/")}
