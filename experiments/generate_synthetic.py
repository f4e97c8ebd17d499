"""Generate the synthetic dataset once: `make shards`, or
`python -m experiments.generate_synthetic --config experiments/configs/nano/shards.yaml`.

It writes <root>/shards/sft, <root>/shards/rl_pool, <root>/MIG-Bench and <root>/validation/MIG-Bench; for
kind=multi_box it writes only shards, which include those for evaluation. If the same code has written them before with
the same settings, it does nothing. A dataset with other settings is renamed first. If a folder with one of these names
was not written by this command, such as the real benchmark, it is not touched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from datamodules.persistence import folder_lock
from datamodules.persistence.files import fingerprint
from datamodules.streaming.path_fingerprint import path_fingerprint
from experiments.runs import run_identity
from experiments.runs.changes import MadeOf
from experiments.runs.command_line.run_words import read_yamls
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.runs.subprocess_steps import run_process

GENERATOR = Path(__file__).resolve().parents[1] / "datamodules" / "synthetic"


def build(
    root: str,
    seed: int,
    train_samples: int,
    eval_per_task: int,
    pool_samples: int,
    validation_per_task: int = 100,
    keep: bool = False,
    kind: Literal["mig_bench", "multi_box"] = "mig_bench",
) -> None:
    """Generate the synthetic dataset.

    Args:
        root: folder to write
        seed: seed of the training data; for every seed, its scenes differ from those of the benchmark
        train_samples: samples for CoT-SFT, with a rationale
        eval_per_task: MIG-Bench questions of each of the ten tasks
        pool_samples: number of in-domain prompts from which rejection sampling chooses
        validation_per_task: questions like those of MIG-Bench, with other scenes, for choosing settings
        keep: keep a finished dataset even if it has other settings, so that training uses a dataset that was made on
            purpose with `make shards ARGS=...`
        kind: the questions: MIG-Bench's, which one box answers, or those that several boxes in several images answer
            (datamodules/synthetic/multi_box), which have no validation questions
    """
    settings = {
        "seed": seed,
        "train_samples": train_samples,
        "eval_per_task": eval_per_task,
        "validation_per_task": validation_per_task,
        "pool_samples": pool_samples,
    }
    sources = [path_fingerprint(file) for file in sorted(GENERATOR.glob("*.py"))]
    if kind == "multi_box":
        del settings["validation_per_task"]
        sources += [path_fingerprint(file) for file in sorted(GENERATOR.glob("multi_box/*.py"))]
    # The key changes with the settings and with the code of the generator.
    key = fingerprint(settings, sources)
    with folder_lock.locked(Path(root)):
        refuse_foreign(Path(root))
        if keep and run_identity.read_marker(Path(root)).get("key", key) != key:
            print(
                f"{root} holds a dataset of other settings or of another version of the generator. It is kept; "
                "`make shards` generates it again"
            )
            return
        if run_identity.claim(Path(root), MadeOf(key, settings)):
            print(f"{root} is already built with these settings", flush=True)
            return
        print(f"generating the synthetic dataset: {root}", flush=True)
        # Imported here, so that a finished dataset is recognised without loading the generator.
        from datamodules.synthetic.multi_box.write_multi_box import build_multi_box
        from datamodules.synthetic.write_samples import build_nano

        (build_multi_box if kind == "multi_box" else build_nano)(root, **settings)
        run_identity.write_marker(Path(root), key=key)


def refuse_foreign(root: Path) -> None:
    """End the program if `root` has folders that would be replaced but were not written by this command."""
    if run_identity.read_marker(root, run_identity.STARTED):  # written by this command
        return
    foreign = [str(root / name) for name in ("shards", "MIG-Bench", "validation") if (root / name).exists()]
    if foreign:
        sys.exit(
            f"root={str(root)!r}: {', '.join(foreign)} would be replaced, but this command did not write it; choose "
            "another root"
        )


def dataset_configs(configs: str | list[str] | None) -> list[str]:
    """The YAMLs of a field `synthetic_dataset`: one, several, or none."""
    return [configs] if isinstance(configs, str) else list(configs or [])


def absent_data(configs: list[str]) -> list[str]:
    """The folders of those datasets, by their YAMLs, that are not finished."""
    roots = [read_yamls(["--config", config]).get("root") for config in configs]
    return [str(root) for root in roots if root is not None and not Path(root, run_identity.DONE).is_file()]


def build_synthetic(configs: list[str]) -> None:
    """Generate the dataset of each YAML in a process of its own, unless there is a finished one with any settings.

    The process is always run: it checks by itself whether there is work to do.
    """
    for config in configs:
        command = ["experiments.generate_synthetic", "--config", config, "--keep=true"]
        if run_process([sys.executable, "-m", *command], lambda: None) != 0:
            sys.exit(f"the synthetic dataset of {config} could not be built")


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make shards`."""
    run_cli(build, args)


if __name__ == "__main__":
    main()
