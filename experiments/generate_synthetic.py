"""Generate the nano world once: `make shards`, or
`python -m experiments.generate_synthetic --config experiments/configs/nano/shards.yaml`.

It writes <root>/shards/sft, <root>/shards/rl_pool, <root>/MIG-Bench and <root>/validation/MIG-Bench, and does nothing
when they are there already, made by the same generator with the same settings. A world of other settings is moved
aside. Folders of these names that it did not make, such as a download of the real benchmark, it refuses to touch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from datamodules.persistence.files import fingerprint
from datamodules.persistence.processes import ProcessLost
from datamodules.streaming.path_fingerprint import path_fingerprint
from experiments.runs import run_identity
from experiments.runs.changes import MadeOf
from experiments.runs.commands import command

GENERATOR = Path(__file__).resolve().parents[1] / "datamodules" / "synthetic"


def build(
    root: str,
    seed: int,
    train_samples: int,
    eval_per_task: int,
    pool_samples: int,
    validation_per_task: int = 100,
    keep: bool = False,
) -> None:
    """Build the nano world.

    Args:
        root: folder to write
        seed: seed of the generator; the benchmark's scenes differ from the training scenes at every seed
        train_samples: samples with a rationale, of the four in-domain tasks, for CoT-SFT
        eval_per_task: MIG-Bench questions of each of the ten tasks
        pool_samples: in-domain prompts from which rejection sampling picks
        validation_per_task: questions like MIG-Bench's, of other scenes, on which settings are chosen
        keep: leave a finished world as it is also when it is one of other settings; so one that was made on purpose
            with `make shards ARGS=...` is what training then uses
    """
    settings = {
        "seed": seed,
        "train_samples": train_samples,
        "eval_per_task": eval_per_task,
        "validation_per_task": validation_per_task,
        "pool_samples": pool_samples,
    }
    sources = [path_fingerprint(file) for file in sorted(GENERATOR.glob("*.py"))]
    key = fingerprint(settings, sources)
    with run_identity.locked(Path(root)):
        refuse_foreign(Path(root))
        if keep and run_identity.read_marker(Path(root)).get("key", key) != key:
            print(f"{root} holds a world of other settings or of another generator: kept; `make shards` makes it anew")
            return
        if run_identity.claim(Path(root), MadeOf(key, settings)):
            print(f"{root} is already built with these settings", flush=True)
            return
        # Imported late: a finished world is recognised without loading the generator.
        from datamodules.synthetic.write_samples import build_nano

        build_nano(root, **settings)
        run_identity.write_marker(Path(root), key=key)


def refuse_foreign(root: Path) -> None:
    """End the program where `root` holds folders that a build would replace and no build has made."""
    if run_identity.read_marker(root, run_identity.STARTED):
        return
    foreign = [str(root / name) for name in ("shards", "MIG-Bench", "validation") if (root / name).exists()]
    if foreign:
        sys.exit(
            f"root={str(root)!r}: {', '.join(foreign)} would be replaced and was not made here; choose another root"
        )


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make shards`."""
    try:
        auto_cli(build, as_positional=False, args=args)
    except ProcessLost as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
