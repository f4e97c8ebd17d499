"""The benchmark end to end on the tiny shape, as it would run on a GPU machine, and its parts that decide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench import run
from experiments.bench.cases import GROWTH, Case, cases, workloads
from experiments.bench.contender_process import ContenderFailed, OutOfTime
from experiments.bench.measure import measure
from experiments.bench.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
# A Python that starts with this file is one of a machine where three packages are not installed.
BARE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"wandb", "webdataset", "jsonargparse"}


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (found for found in super().find_distributions(*args, **kwargs) if found.name.lower() not in ABSENT)


sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_bench(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    where = ["--output", str(folder / "out"), "--models", str(folder / "models"), "--threads", "1"]
    command = [sys.executable, "-m", "experiments.bench.run", "--shapes", "tiny", *where, *arguments]
    return subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BARE)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_it_runs_without_the_optional_packages_and_goes_on_where_it_stopped(
    tmp_path: Path, bare: dict[str, str]
) -> None:
    absent = [sys.executable, "-c", "import wandb"]
    probe = subprocess.run(absent, env=os.environ | bare, capture_output=True, text=True)
    assert "No module named 'wandb'" in probe.stderr

    chosen = ["--contenders", "ours", "--cases", "grpo group_size", "sft"]
    first = run_bench(tmp_path, *chosen, **bare)
    assert first.returncode == 0, first.stderr + "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    stored = json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"]
    assert set(stored) == {"sft", "grpo group_size=2", "grpo group_size=4"}
    for result in stored.values():
        ours = result["contenders"]["ours"]
        assert ours["seconds"] > 0 and ours["peak_bytes"] > 0
        assert 0 < result["lower_bound_share"] < 1
        assert sum(ours["phases"].values()) == pytest.approx(ours["seconds"], rel=0.5)

    (tmp_path / "out" / "logs" / "tiny-ours.log").unlink()
    second = run_bench(tmp_path, *chosen, **bare)
    assert second.returncode == 0
    assert not list(tmp_path.rglob("*.log"))  # no contender was started
    assert "grpo group_size=4" in second.stdout


@pytest.mark.slow
def test_both_sides_read_the_same_tokens_and_begin_at_the_same_loss(tmp_path: Path) -> None:
    finished = run_bench(tmp_path, "--growth", "none", "--cases", "grpo", "sft")
    assert finished.returncode == 0, finished.stderr + "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    stored = json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"]
    for name, result in stored.items():
        ours, trl = result["contenders"]["ours"], result["contenders"]["trl"]
        assert (ours["prompt_tokens"], ours["completion_tokens"]) == (trl["prompt_tokens"], trl["completion_tokens"])
        assert result["ratio"] == pytest.approx(trl["seconds"] / ours["seconds"]), name
    losses = [contender["first_loss"] for contender in stored["sft"]["contenders"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_two_ways_of_sampling_are_compared_on_the_same_prompts(tmp_path: Path) -> None:
    finished = run_bench(tmp_path, "--cases", "window", "ragged")
    assert finished.returncode == 0, finished.stderr + "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    stored = json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"]
    for case in (case for case in cases("tiny") if case.variants):
        first, second = (stored[case.name]["contenders"][contender] for contender in case.contenders)
        assert first["prompt_tokens"] == second["prompt_tokens"] and stored[case.name]["ratio"] > 0
        assert f"tokens/s of the rollout, {' / '.join(case.contenders)}: " in finished.stdout
        workload = case.workload_of(case.contenders[1])
        expected = workload.prompts * workload.group_size * workload.completion_tokens
        assert second["completion_tokens"] == expected, "every completion has the stated length"
    ragged, equal = (stored["ragged"]["contenders"][name] for name in ("ragged", "equal"))
    assert ragged["completion_tokens"] == pytest.approx(equal["completion_tokens"], rel=0.3)
    assert not {"forward", "backward"} & ragged["phases"].keys(), "nothing is trained on"


def test_a_run_that_has_no_time_left_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run.main(["--shapes", "tiny", "--minutes", "0", "--output", str(tmp_path), "--models", str(tmp_path)])
    assert code == 0
    assert "run the same command again for: tiny grpo, tiny sft" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_a_side_that_cannot_start_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no trl here >&2\nexit 3\n")
    broken.chmod(0o755)
    folders = ["--output", str(tmp_path), "--models", str(tmp_path), "--threads", "1"]
    code = run.main(
        ["--shapes", "tiny", "--cases", "sft", "--contenders", "trl", "--trl-python", str(broken), *folders]
    )
    assert code == 1
    captured = capsys.readouterr()
    assert "no trl here" in captured.err
    assert "Failed: tiny sft" in captured.out


class StubContender:
    """Answers like a contender whose steps take the stated seconds."""

    def __init__(self, log: list[str], name: str, seconds: list[float], inputs: str = "same") -> None:
        self.log, self.name, self.seconds, self.inputs = log, name, iter(seconds), inputs

    def tell(self, **command: str) -> None:
        self.answer = self.ask(**command)

    def read(self) -> dict:
        return self.answer

    def ask(self, do: str, exact: bool = False, **_: object) -> dict:
        self.log.append(f"{self.name} {'exact ' if exact else ''}{do}")
        if do != "step":
            return {}
        seconds = next(self.seconds)
        times = {"seconds": seconds, "cpu_seconds": seconds, "phases": {"other": seconds}}
        counts = {"prompt_tokens": 100, "completion_tokens": 64, "patches": 16, "peak_bytes": 1}
        return times | counts | {"inputs": self.inputs}


def test_sides_take_turns_and_untimed_steps_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ROOT / "models/nano-base/config.json").read_text())
    case = Case("sft", Workload(task="sft", group_size=1), turns=2, warmup=0, steps=2)
    log: list[str] = []
    contenders = {
        "ours": StubContender(log, "ours", [99.0, 1.0, 1.0, 2.0, 2.0]),
        "trl": StubContender(log, "trl", [99.0, 3.0, 3.0, 12.0, 12.0]),
    }
    peaks = run.Peaks(1e12, 1e12, "stated")
    result = measure(case, str(tmp_path), contenders, peaks)
    assert result["contenders"]["ours"]["steps"] == [[1.0, 1.0], [2.0, 2.0]]
    assert result["ratio_by_turn"] == [3.0, 6.0]
    assert result["ratio"] == 7.5 / 1.5
    steps = [line.split()[0] for line in log if line.endswith("step")]
    assert steps == ["ours"] * 3 + ["trl"] * 5 + ["ours"] * 2


def test_a_long_step_is_not_warmed_up_again_and_is_timed_by_phase(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ROOT / "models/nano-base/config.json").read_text())
    case = Case("sft", Workload(task="sft", group_size=1), turns=2, warmup=1, steps=1)
    log: list[str] = []
    contenders = {
        "ours": StubContender(log, "ours", [99.0, 1.0, 7.0, 2.0]),
        "trl": StubContender(log, "trl", [99.0, 30.0, 40.0]),
    }
    result = measure(case, str(tmp_path), contenders, run.Peaks(1e12, 1e12, "stated"))
    assert [result["contenders"][name]["steps"] for name in contenders] == [[[1.0], [2.0]], [[30.0], [40.0]]]
    assert [result["contenders"][name]["phases"]["other"] for name in contenders] == [7.0, 40.0]
    steps = [line.split() for line in log if line.endswith("step")]
    asked = {name: [how for contender, how, *_ in steps if contender == name] for name in contenders}
    assert asked == {"ours": ["exact", "step", "exact", "step"], "trl": ["exact", "step", "exact"]}


def test_sides_that_read_different_tokens_are_refused(tmp_path: Path) -> None:
    case = Case("sft", Workload(task="sft", group_size=1), turns=1, steps=1)
    contenders = {name: StubContender([], name, [1.0, 1.0], inputs=name) for name in ("ours", "trl")}
    with pytest.raises(ValueError, match="different tokens at step 0"):
        measure(case, str(tmp_path), contenders, run.Peaks(1.0, 1.0, "stated"))


def test_a_side_that_is_silent_is_not_waited_for_forever(tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    contender = run.Contender("ours", str(silent), 1, tmp_path / "log", deadline=run.time.monotonic() + 0.2)
    with pytest.raises(OutOfTime, match="ours did not answer"):
        contender.await_greeting()
    contender.close()


def test_a_side_that_died_between_two_commands_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    broken.chmod(0o755)
    contender = run.Contender("ours", str(broken), 1, tmp_path / "log", deadline=run.time.monotonic() + 60)
    contender.process.wait()
    with pytest.raises(ContenderFailed, match="out of memory"):
        contender.ask(do="step")
    contender.close()


@pytest.mark.parametrize("shape", ["tiny", "nano", "3b", "7b"])
def test_each_shape_has_both_tasks_and_all_growth(shape: str) -> None:
    names = [case.name for case in cases(shape)]
    assert names[:2] == ["grpo", "sft"] and len(names) == len(set(names))
    if shape != "tiny":
        for field, values in GROWTH.items():
            assert [f"grpo {field}={value}" for value in values] == [n for n in names if n.startswith(f"grpo {field}")]


def test_the_gpu_workload_is_the_measured_one() -> None:
    grpo = workloads("7b")["grpo"]
    assert (grpo.prompts, grpo.group_size, grpo.completion_tokens, grpo.images) == (2, 8, 256, 3)
    assert (grpo.image_size, grpo.lora_rank, grpo.dtype) == ((640, 480), 64, "bfloat16")
    assert grpo.gradient_checkpointing and grpo.activation_gib == 6


def test_a_workload_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts=0 must be greater than 0"):
        Workload(prompts=0)
    with pytest.raises(ValueError, match="task='ppo'"):
        Workload(task="ppo")
