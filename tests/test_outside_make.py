from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from tests.outside_make import outside_make

ROOT = Path(__file__).resolve().parents[1]


def test_an_inner_make_gets_nothing_of_the_outer_ones_command_line(tmp_path: Path) -> None:
    """`make test ARGS="-k name"` had handed ARGS on to every make that a test started."""
    inner = "from tests.outside_make import outside_make; print(list(outside_make()))"
    (tmp_path / "Makefile").write_text(f'inner:\n\t@cd {ROOT} && {sys.executable} -c "{inner}"\n')
    words = ["make", "--no-print-directory", "-C", str(tmp_path), 'ARGS=-k "it\'s a=b" --maxfail 1', "SEED=3"]
    run = subprocess.run(words, env=outside_make(), capture_output=True, text=True, check=True)
    names = set(ast.literal_eval(run.stdout))
    assert "PATH" in names and not names & {"ARGS", "SEED", "MAKEFLAGS", "MAKELEVEL"}


def test_without_an_outer_make_the_environment_stays(monkeypatch) -> None:
    for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    assert outside_make() == dict(os.environ)
