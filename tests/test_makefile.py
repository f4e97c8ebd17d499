"""Variables of make: one that a target does not read is refused, and a list reaches the command whole."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.outside_make import outside_make

ROOT = Path(__file__).resolve().parents[1]


def dry_run(*words: str) -> subprocess.CompletedProcess:
    command = ["make", "-n", "--no-print-directory", "STAMP=Makefile", *words]
    return subprocess.run(command, cwd=ROOT, env=outside_make(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words", [("ablations", "SEED=1"), ("grpo", "MODEL=m"), ("sweep", "GPUS=8"), ("sft", "test", "SEED=1")]
)
def test_a_variable_that_a_target_does_not_read_is_refused(words: tuple[str, ...]) -> None:
    done = dry_run(*words)
    name = words[-1].partition("=")[0]
    assert done.returncode != 0 and not done.stdout
    assert f"make {words[-2]} does not read {words[-1]}; nothing was started. {name} is for: " in done.stderr
    assert dry_run(*words[:-1], f"{name}=").returncode == 0, "empty is as good as not given"


def test_each_target_reads_the_variables_that_are_said_to_be_its() -> None:
    text = (ROOT / "Makefile").read_text()
    said = {name: targets.split() for name, targets in re.findall(r"(?m)^of_(\w+) := ([a-z -]+)$", text)}
    assert len(said) > 10
    values = {"SOURCE": "jsonl", "KEEP": "1"}
    needed = {"inspect": ["DATA=d"], "publish": ["MODEL=m", "REPO=o/r"], "agent": ["SWEEP=e/p/i"]}
    needed["shards"] = ["SOURCE=coco"]
    for name, targets in said.items():
        for target in targets:
            others = [word for word in needed.get(target, []) if not word.startswith(f"{name}=")]
            others += ["CONFIG=c.yaml"] * (
                target in said["CONFIG"] and name not in ("CONFIG", *needed) and target != "shards"
            )
            value = values.get(name, "given")
            with_it, without = dry_run(target, *others, f"{name}={value}"), dry_run(target, *others)
            assert with_it.returncode == 0, (target, name, with_it.stderr)
            if name == "QUESTION":  # the shell reads it
                assert '"$QUESTION"' in with_it.stdout
            elif not (target == "shards" and name == "CONFIG"):  # of the synthetic dataset alone
                assert with_it.stdout != without.stdout, (target, name)


@pytest.mark.parametrize("words", [("eval", "BENCH=lisa blink"), ("eval", "DATA=lisa  blink")])
def test_several_benchmarks_are_one_flag(words: tuple[str, ...]) -> None:
    assert "--bench lisa,blink " in dry_run(*words, "CONFIG=c.yaml").stdout
