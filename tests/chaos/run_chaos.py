"""Kill a short pipeline again and again, and show that it ends as one that was left alone: `make chaos`.

    python -m tests.chaos.run_chaos --folder outputs/chaos --kills 20 --seed 0

The nano pipeline, made short, is run undisturbed and then once more with kills at random moments, spread over its
phases: SIGKILL to all its processes, SIGKILL to one of them, or SIGTERM to the pipeline. After each the same command is
given again. <folder>/chaos.md then says which kill fell where, and what differs at the end: nothing, or it ends with 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.persistence.files import write_atomic
from experiments.runs.commands import command
from tests.chaos.compare_runs import differences
from tests.chaos.killed_pipeline import POLL_SECONDS, ROOT, STAGES, Pipeline, write_configs

# In the order in which a pipeline comes to them, and the share of the kills that falls into each.
PHASES = {
    "dataset": 1,
    "base: evaluation": 2,
    "cot_sft: training": 4,
    "cot_sft: merge": 1,
    "cot_sft: evaluation": 2,
    "cot_sft: report": 1,
    "grpo: rejection sampling": 3,
    "grpo: training": 4,
    "grpo: merge": 1,
    "grpo: evaluation": 1,
}
KINDS = ("all", "one", "term")


@dataclass(frozen=True)
class Kill:
    """What was done, and in which phase it fell."""

    phase: str
    kind: str
    target: str
    seconds: float  # since the phase was seen to begin


def plan_kills(number: int) -> list[str]:
    """The phases of `number` kills in the order of the phases; each has its share."""
    weights = list(PHASES.values())
    marks = [(k + 0.5) * sum(weights) / number for k in range(number)]
    return [next(phase for i, phase in enumerate(PHASES) if sum(weights[: i + 1]) > mark) for mark in marks]


def disturb(pipeline: Pipeline, planned: Sequence[str], spent: dict[str, float], rng: random.Random) -> list[Kill]:
    """Run the pipeline to its end with a kill in each planned phase; what was killed where."""
    order, kills = list(PHASES), []
    kinds = [KINDS[k % len(KINDS)] for k in range(len(planned))]
    rng.shuffle(kinds)
    pipeline.start()
    for number, (target, kind) in enumerate(zip(planned, kinds, strict=True)):
        begun = None
        later = order[order.index(target) :]
        delay = rng.uniform(0, spent.get(target, 1.0) / planned.count(target))
        if target.endswith("report"):
            delay = 0.0  # it takes some milliseconds
        while begun is None or time.monotonic() < begun + delay:
            time.sleep(POLL_SECONDS)
            if pipeline.process.poll() is not None:
                if pipeline.process.returncode == 0:
                    return kills
                pipeline.start()  # one that had lost a process before, or had been asked to end
            if begun is None and pipeline.phase() in later:
                begun = time.monotonic()
        phase = pipeline.phase() or "between two phases"
        whom = pipeline.kill(kind, rng)
        kills.append(Kill(phase, kind, whom, time.monotonic() - begun))
        print(f"kill {number + 1} of {len(planned)}: {phase}, {kind}: {whom}", flush=True)
        if kind == "one":
            pipeline.wait_for_phase(phase)  # it lives on where the one was left from an earlier start
        else:
            pipeline.wait()
        if pipeline.process.poll() is not None:
            pipeline.start()
    for _ in range(3):
        if pipeline.wait(3600.0) == 0:
            return kills
        pipeline.start()
    sys.exit(f"the pipeline does not end any more: {pipeline.log}")


def render(kills: Sequence[Kill], spent: dict[str, float], found: Sequence[str], seed: int) -> str:
    """The report, as Markdown."""
    phases = [*PHASES, *sorted({kill.phase for kill in kills} - set(PHASES))]
    count = Counter((kill.phase, kill.kind) for kill in kills)
    lines = [f"# {len(kills)} kills, seed {seed}", "", f"| phase | undisturbed, s | {' | '.join(KINDS)} |"]
    lines += ["| --- |" + " --- |" * (1 + len(KINDS))]
    for phase in phases:
        cells = [str(count[phase, kind] or "") for kind in KINDS]
        lines.append(f"| {phase} | {spent.get(phase, 0.0):.1f} | {' | '.join(cells)} |")
    lines += ["", *(f"{n + 1}. {k.phase}, {k.seconds:.1f} s: {k.kind}, {k.target}" for n, k in enumerate(kills)), ""]
    lines += [f"- differs: {line}" for line in found] or ["Nothing differs."]
    return "\n".join(lines) + "\n"


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make chaos`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/chaos"), help="removed first")
    parser.add_argument("--model", default=str(ROOT / "models/nano-base"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds of the kills")
    given = parser.parse_args(args)
    folder = given.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    config = write_configs(folder / "configs", given.model)
    alone, disturbed = (Pipeline(config, folder / name) for name in ("alone", "disturbed"))
    spent = alone.run_watched()
    shutil.rmtree(folder / "dataset")  # so that its making can be killed too
    kills = disturb(disturbed, plan_kills(given.kills), spent, random.Random(given.seed))
    found = differences(alone.folder, disturbed.folder, STAGES)
    if len(kills) < given.kills:
        found.append(f"only {len(kills)} of {given.kills} kills were made before the pipeline had ended")
    report = render(kills, spent, found, given.seed)
    write_atomic(folder / "chaos.md", report)
    print(report, flush=True)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
