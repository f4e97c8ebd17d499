"""The console command: its words, and that it becomes the process of a module."""

from __future__ import annotations

import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runs.command_line import mig

ROOT = Path(__file__).resolve().parents[4]


def test_every_command_of_make_is_one_of_mig() -> None:
    made = set(re.findall(r"-m (experiments\.[\w.]+)", (ROOT / "Makefile").read_text())) - {"experiments."}
    made |= {"experiments.generate_synthetic", "experiments.import_shards"}  # `make shards` chooses one of them
    assert set(mig.COMMANDS.values()) == made
    assert all(importlib.util.find_spec(module) for module in mig.COMMANDS.values())


def test_setup_names_it() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    module, _, function = setup["options.entry_points"]["console_scripts"].strip().removeprefix("mig = ").partition(":")
    assert module == mig.__name__ and getattr(mig, function) is mig.main


@pytest.mark.parametrize(("word", "cure"), [("trian", "did you mean train?"), ("xyzzy", "mig --help lists all")])
def test_an_unknown_word_is_refused(word: str, cure: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"mig {word}: no such command")) as refused:
        mig.main([word])
    assert cure in str(refused.value.code)


def test_it_lists_its_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom experiments.runs.command_line import mig\nmig.main(['--help'])\n"
        "print(sorted({'torch', 'lightning', 'jsonargparse', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *lines, loaded = ended.stdout.splitlines()
    assert loaded == "[]" and len(lines) == len(mig.COMMANDS) + 1


def test_the_exit_code_and_the_message_are_the_commands() -> None:
    command = [sys.executable, "-m", mig.__name__, "runs", "--outputs", "/nope"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr == "--outputs=/nope: there is no such folder, and so no run\n"
