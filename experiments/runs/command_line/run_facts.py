"""What a run records for its report beside settings and commit: its command line and the machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

GPU_FILES = "driver/nvidia/gpus/*/information"  # below /proc; read without torch, whose import takes seconds
PACKAGES = ("torch", "transformers", "lightning")


def run_facts(module: str, words: Sequence[str] | None = None) -> dict[str, Any]:
    """The fields "command" and "machine" of a run.

    Args:
        module: the module that was started.
        words: its command line; None means that of this process.
    """
    given = sys.argv[1:] if words is None else words
    return {"command": shlex.join(["python", "-m", module, *map(str, given)]), "machine": describe_machine()}


def describe_machine(proc: Path = Path("/proc")) -> dict[str, str]:
    """Processor, cores, memory, GPUs and versions of this machine, each as text; without its name."""
    facts = {"processor": _processor(proc), "cores": str(_num_cores())}
    if memory := re.search(r"^MemTotal:\s+(\d+)", _read(proc / "meminfo"), re.MULTILINE):
        facts["memory"] = f"{int(memory[1]) / 2**20:.0f} GiB"
    models = [re.search(r"^Model:\s*(.+)", _read(file), re.MULTILINE) for file in sorted(proc.glob(GPU_FILES))]
    names = [model[1].strip() for model in models if model]
    facts["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
    facts["Python"] = platform.python_version()
    return facts | {name: metadata.version(name) for name in PACKAGES}


def _processor(proc: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)", _read(proc / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(file: Path) -> str:
    """The text of a file; "" where the system has none."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
