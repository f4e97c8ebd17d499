"""What a run records of its command line and machine."""

from __future__ import annotations

import shlex
from pathlib import Path

from experiments.runs.command_line.run_facts import describe_machine, run_facts


def test_the_command_can_be_pasted() -> None:
    words = ["--config", "a b.yaml", "--model.rewards=['x']"]
    assert shlex.split(run_facts("experiments.train", words)["command"]) == [
        "python",
        "-m",
        "experiments.train",
        *words,
    ]


def test_the_machine_is_described_by_its_parts(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nprocessor\t: 1\nmodel name\t: x\n"
    )
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    for number in range(2):
        folder = tmp_path / f"driver/nvidia/gpus/{number}"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 3\n")
    facts = describe_machine(tmp_path)
    assert (
        facts["processor"] == "Fast CPU @ 3 GHz" and facts["memory"] == "16 GiB" and facts["GPUs"] == "2 x NVIDIA H200"
    )
    assert int(facts["cores"]) >= 1 and facts["torch"]


def test_a_system_without_these_files_is_described_too(tmp_path: Path) -> None:
    facts = describe_machine(tmp_path)
    assert facts["GPUs"] == "none" and facts["processor"] and "memory" not in facts
