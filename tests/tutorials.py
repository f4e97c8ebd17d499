"""Run a page: its files are written, its commands and Python blocks are run, in the order of the page, in one folder.

A comment in front of a block says what is done with it; other blocks are only shown:

    <!-- run -->               a Python block, or an indented block of commands
    <!-- file: my/name.py -->  a block that the reader saves under this name

The commands of make are those that the Makefile would run. A page has settings for real runs, so the test gives further
flags for each module that make them small.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.outside_make import outside_make

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(
    r"<!-- (run|file: (\S+)) -->\n+(?:```(\w+)\n(.*?)^```|((?: {4}[^\n]*\n|\n)+))", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A marked block of a page: `file` is the name that it is saved under; else it is run as Python or as commands."""

    text: str
    language: str | None  # None for indented commands
    file: str | None


def marked_blocks(page: Path) -> list[Block]:
    """All marked blocks, in order."""
    found = []
    for _, file, language, fenced, indented in MARKED.findall(page.read_text(encoding="utf-8")):
        text = fenced or re.sub(r"^ {4}", "", indented, flags=re.MULTILINE)
        found.append(Block(text.strip("\n") + "\n", language or None, file or None))
    return found


def run_page(
    page: Path, folder: Path, flags: Mapping[str, Sequence[str]] = {}, replace: Mapping[str, str] = {}
) -> list[str]:
    """Run all marked blocks of a page in `folder`. Returns the output of each block that was run.

    Args:
        page: the Markdown file.
        folder: working directory; it sees the repository's experiments/ and models/.
        flags: module -> flags that are added to each of its commands.
        replace: text of the page -> text that is used instead, such as a path on the reader's machine.
    """
    for name in ("experiments", "models"):
        (folder / name).symlink_to(ROOT / name)
    outputs = []
    for block in marked_blocks(page):
        text = block.text
        for old, new in replace.items():
            text = text.replace(old, new)
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(text)
        elif block.language == "python":
            outputs.append(_run([sys.executable, "-c", text], folder))
        else:
            commands = [shell for line in text.replace("\\\n", " ").splitlines() for shell in shell_lines(line, flags)]
            outputs.append("".join(_run(["bash", "-ec", command], folder) for command in commands))
    return outputs


def shell_lines(line: str, flags: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The commands of one line of a page, with the Python of the tests, and with their further flags."""
    words = shlex.split(line, comments=True)
    lines = [shlex.join(words)] if words else []
    if words[:1] == ["make"]:
        asked = ["make", "--dry-run", "--no-print-directory", *words[1:]]
        shown = subprocess.run(asked, cwd=ROOT, env=outside_make(), capture_output=True, text=True, check=True)
        # Only commands of the project: make would also install packages where it has not done so.
        lines = [found for found in shown.stdout.replace("\\\n", " ").splitlines() if " -m experiments." in found]
        assert lines, f"{line}: this runs no command of the project"
    for command in lines:
        command = re.sub(r"(?<!\S)(?:\.venv/bin/)?python(?= )", shlex.quote(sys.executable), command)
        module = re.search(r" -m (\S+)", command)
        yield f"{command} {shlex.join(flags.get(module[1], ()))}" if module else command


def _run(command: Sequence[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"WANDB_MODE": "offline", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command[-1][:400]}\n{ended.stdout[-1500:]}\n{ended.stderr[-1500:]}"
    return ended.stdout
