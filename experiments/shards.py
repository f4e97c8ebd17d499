"""Generate the nano world once: `python -m experiments.shards --config experiments/configs/nano/shards.yaml`.

It writes <root>/shards/sft, <root>/shards/rl_pool and <root>/MIG-Bench, and does nothing when they are there already,
made by the same generator with the same settings.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from datamodules.artefacts import fingerprint, path_fingerprint
from experiments import phases

GENERATOR = Path(__file__).resolve().parents[1] / "datamodules" / "synthetic"


def build(
    root: str, seed: int = 0, train_samples: int = 20_000, eval_per_task: int = 120, pool_samples: int = 6_000
) -> None:
    """Build the nano world.

    Args:
        root: folder to write
        seed: seed of the generator; the benchmark's scenes differ from the training scenes at every seed
        train_samples: samples with a rationale, of the four in-domain tasks, for CoT-SFT
        eval_per_task: MIG-Bench questions of each of the ten tasks
        pool_samples: in-domain prompts from which rejection sampling picks
    """
    settings = {"seed": seed, "train": train_samples, "eval": eval_per_task, "pool": pool_samples}
    sources = [path_fingerprint(file) for file in sorted(GENERATOR.glob("*.py"))]
    key = fingerprint(settings, sources)
    with phases.locked(Path(root)):
        if phases.claim(Path(root), key):
            print(f"{root} is already built with these settings", flush=True)
            return
        # Imported late: a finished world is recognised without loading the generator.
        from datamodules.synthetic.build import build_nano

        build_nano(root, seed=seed, train_samples=train_samples, eval_per_task=eval_per_task, pool_samples=pool_samples)
        phases.write_marker(Path(root), key=key)


def main(args: list[str] | None = None) -> None:
    """Entry point of `make shards`."""
    auto_cli(build, as_positional=False, args=args)


if __name__ == "__main__":
    main()
