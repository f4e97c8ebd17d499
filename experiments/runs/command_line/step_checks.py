"""Check the settings of all steps of a pipeline before anything is made or run.

One process checks them all, because each process would import torch and Lightning, which takes seconds:

    python -m experiments.runs.command_line.step_checks '[["cot_sft: training", ["experiments.train", ...]], ...]'
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from datamodules.persistence.files import read_json
from experiments.runs import run_identity
from experiments.runs.commands import command
from experiments.runs.subprocess_steps import Step, run_process, say


def check_steps(steps: Sequence[Step], absent: Sequence[str]) -> None:
    """End the program if the settings of a step cannot be run, or if its folder holds a run with other settings.

    Args:
        steps: all steps. One that goes on with its own run needs no check. Of steps with the same title, such as those
            of several seeds, only the first is checked, unless its folder holds a run.
        absent: files and folders that are still to be made.
    """
    asked: dict[str, list[list[str]]] = {}
    for step in steps:
        is_its_own = read_json(step.marker).get("key") == step.key()
        is_taken = (step.marker.parent / run_identity.STARTED).is_file()
        if step.checks and not is_its_own and (is_taken or step.title not in asked):
            words = [f"--check_without=[{','.join(absent)}]", *([f"--{step.choice}"] if step.choice else [])]
            asked.setdefault(step.title, []).append([*step.command, *words])
    if not asked:
        return
    say("checking the settings of all stages")
    listed = [[title, words] for title, commands in asked.items() for words in commands]
    module = ["-m", "experiments.runs.command_line.step_checks"]
    if code := run_process([sys.executable, *module, json.dumps(listed)], lambda: None):
        sys.exit(code)


@command
def main() -> None:
    """Check the steps of the command line. Ends the program at the first one that is refused, with its title."""
    listed = json.loads(sys.argv.pop())  # Lightning warns about a command line beside explicit arguments
    for title, (module, *words) in listed:
        try:
            importlib.import_module(module).main(words)
        except SystemExit as end:
            if end.code:
                # A parser has printed its message already, and ends with a number.
                sys.exit(f"{title}: {end.code if isinstance(end.code, str) else 'refused, see above'}")


if __name__ == "__main__":
    main()
