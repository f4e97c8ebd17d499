"""Train one phase from one YAML: `python -m experiments.train --config X.yaml [--model.learning_rate=1e-4 ...]`.

All files of the phase are in outputs/<experiment>/<phase>/. If the command is started again, it resumes from the last
checkpoint. If the phase is finished with the same settings and inputs, the command says so and ends. If the folder
holds a run with other settings, the command names them and ends: --experiment NAME keeps both runs, --redo moves the
old one aside. If only source files of the project have changed, it asks for --keep (take the existing run, or resume
it) or --redo.

Beside the settings of the YAML there are --seed N (as in the pipeline: outputs/<experiment>-seedN), --gpus N (keeps the
total batch) and --check_without '[data/nano]', which only checks the settings and the phase folder, and reads nothing
from these paths, because they are still to be made.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import yaml

from datamodules.persistence.garbage import without_collection
from experiments.runs.changes import take_choice
from experiments.runs.command_line.run_words import complete_words, read_paths, take_value
from experiments.runs.command_line.setting_names import refuse_unknown
from experiments.runs.commands import command
from experiments.runs.user_files import find_user_files


def help_of_config(args: list[str]) -> list[str]:
    """The arguments, with --model.help completed to the help of the class that the YAML names."""
    if "--model.help" not in args:
        return args
    words = " ".join(args).replace("--config=", "--config ").split()
    files = [Path(after) for word, after in pairwise(words) if word == "--config" and Path(after).is_file()]
    paths = [yaml.safe_load(file.read_text()).get("model", {}).get("class_path") for file in files]
    found = [path for path in paths if path]
    return [f"--model.help={found[-1]}" if word == "--model.help" and found else word for word in args]


@command
def main(args: list[str] | None = None) -> None:
    """Entry point. Errors in settings are printed all at once, without a traceback, before weights are loaded.

    Raises UserError for every problem that the user can fix.
    """
    # 1. The command line, as far as it can be completed and checked without the classes of the run.
    choice, words = take_choice(sys.argv[1:] if args is None else args)
    words, absent = take_value(words, "--check_without")
    find_user_files(words)
    words = help_of_config(complete_words(words))
    refuse_unknown(words)
    if args is None:
        sys.argv[1:] = words  # Lightning passes sys.argv to the ranks that it starts
    # 2. The run. Imported here, because torch and Lightning take seconds, which a typo need not wait for.
    with without_collection():
        from experiments.runs.command_line import train_phase

    train_phase.run(None if args is None else words, choice, None if absent is None else read_paths(absent))


if __name__ == "__main__":
    main()
