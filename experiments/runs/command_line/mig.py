"""The console command `mig`: `mig train --config X.yaml` is `python -m experiments.train --config X.yaml`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from experiments.runs.commands import command
from experiments.runs.usage_errors import suggest

# Word -> the module that it runs, with the same flags. The order is that of `mig --help`.
COMMANDS = {
    "train": "experiments.train",
    "pipeline": "experiments.pipeline",
    "ablations": "experiments.ablations",
    "sweep": "experiments.sweep",
    "eval": "experiments.evaluate",
    "ask": "experiments.asking.ask_model",
    "demo": "experiments.asking.demo",
    "rescore": "experiments.evaluation.rescore",
    "runs": "experiments.runs.overview.run_table",
    "report": "experiments.reports.pipeline_report",
    "compare": "experiments.compare",
    "predictions": "experiments.reports.predictions.browse_answers",
    "watch": "experiments.reports.live.watch",
    "tables": "experiments.print_tables",
    "dashboard": "experiments.reports.wandb_report",
    "publish": "experiments.runs.sharing.publish",
    "shards": "experiments.generate_synthetic",
    "import": "experiments.import_shards",
    "inspect": "experiments.inspect_shards",
    "synthesize": "experiments.synthesize",
    "base": "experiments.nano.pretrain",
    "bench": "experiments.bench.run",
}


def module_of(word: str) -> str:
    """The module of a command. Ends the program for an unknown word, with the nearest command."""
    if word not in COMMANDS:
        sys.exit(f"mig {word}: no such command{suggest(word, COMMANDS) or '; mig --help lists all'}")
    return COMMANDS[word]


@command
def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `mig`: becomes the process of the command, so signals and exit codes are its own."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("--help", "-h", "help"):
        lines = [f"  mig {word:<11} python -m {module}" for word, module in COMMANDS.items()]
        print(
            "\n".join(["mig COMMAND [--config X.yaml] [--flag=value ...]; mig COMMAND --help lists its flags", *lines])
        )
        return
    os.execv(sys.executable, [sys.executable, "-m", module_of(words[0]), *words[1:]])


if __name__ == "__main__":
    main()
