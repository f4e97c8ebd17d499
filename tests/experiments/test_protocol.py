"""docs/protocol.md: no configuration trains on the benchmark's questions or chooses anything by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from datamodules.benchmarks.mig_bench import TASKS
from datamodules.benchmarks.registry import BENCHMARKS
from datamodules.synthetic.write_samples import BENCHMARK, VALIDATION, benchmark_puzzle

CONFIGS = Path(__file__).resolve().parents[2] / "experiments" / "configs"
FOLDERS = {module.FOLDER for module in BENCHMARKS.values()}


def is_benchmark_file(value: Any) -> bool:
    """Whether a setting names a benchmark or a file of one. Below validation/ are questions of the same form."""
    if not isinstance(value, str):
        return False
    parts = PurePosixPath(value).parts
    named = value in BENCHMARKS or any(part in FOLDERS for part in parts)
    return named and "validation" not in parts


def values(tree: Any) -> Iterator[Any]:
    """All values in a tree of mappings and lists, keys of mappings too."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from values(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value)
    else:
        yield tree


def breaches(settings: Mapping[str, Any]) -> list[str]:
    """Where a YAML of `experiments.train`, or a part of one, trains on a benchmark or measures it inside training."""
    found = [f"data: {value}" for value in values(settings.get("data", {})) if is_benchmark_file(value)]
    for callback in (settings.get("trainer") or {}).get("callbacks", []):
        name = callback["class_path"].rpartition(".")[2]
        arguments = callback.get("init_args", {})
        named = [value for value in values(arguments) if is_benchmark_file(value)]
        # A measurement before or after training decides nothing. One inside training may choose a checkpoint, a trial
        # of a sweep, or the end of the run.
        if named and (arguments.get("every_n_steps") or name in ("RejectionSampling", "HeldOutLoss")):
            found.append(f"{name}: {named[0]}")
    return found


def training_files() -> list[Path]:
    """All YAMLs that have settings of training."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    return [path for path in files if yaml.safe_load(path.read_text()).keys() & {"data", "trainer"}]


def test_no_configuration_trains_on_a_benchmark_or_validates_with_one() -> None:
    names = {str(path.relative_to(CONFIGS)) for path in training_files()}
    assert {"nano/grpo.yaml", "nano/cot_sft.yaml", "nano/sweep_trial.yaml", "paper/grpo_7b.yaml"} <= names
    for path in training_files():
        assert not breaches(yaml.safe_load(path.read_text())), path


@pytest.mark.parametrize(
    "planted",
    [
        {"data": {"shards": "data/nano/MIG-Bench"}},
        {"data": {"shards": [{"path": "data/Ref-L4/shards", "weight": 1}]}},
        {
            "trainer": {
                "callbacks": [
                    {
                        "class_path": "callbacks.mig_bench.MIGBench",
                        "init_args": {"annotations": "data/MIG-Bench/MIG_data.json", "every_n_steps": 5},
                    }
                ]
            }
        },
        {
            "trainer": {
                "callbacks": [
                    {
                        "class_path": "callbacks.benchmark_evaluation.BenchmarkEvaluation",
                        "init_args": {"benchmark": "ref_l4", "data_root": "data", "every_n_steps": 5},
                    }
                ]
            }
        },
        {
            "trainer": {
                "callbacks": [
                    {
                        "class_path": "callbacks.held_out_loss.HeldOutLoss",
                        "init_args": {"shards": "data/nano/MIG-Bench/shards"},
                    }
                ]
            }
        },
    ],
)
def test_a_configuration_that_does_so_is_refused(planted: dict[str, Any]) -> None:
    assert len(breaches(planted)) == 1


def test_choosing_runs_are_measured_on_validation_questions() -> None:
    """Runs that choose the default's settings ask the validation questions. Runs that report ask the benchmark."""
    for name, chooses in (("lengths", True), ("ablations", False), ("pipeline", False)):
        evaluation = yaml.safe_load((CONFIGS / "nano" / f"{name}.yaml").read_text())["evaluation"]
        root = yaml.safe_load((CONFIGS.parents[1] / evaluation).read_text())["data_root"]
        assert root.endswith("/validation") == chooses, name


def test_validation_and_benchmark_share_no_scene() -> None:
    """As many questions as shards.yaml asks for."""
    settings = yaml.safe_load((CONFIGS / "nano" / "shards.yaml").read_text())
    scenes: dict[str, set[str]] = {}
    for split, count in ((BENCHMARK, settings["eval_per_task"]), (VALIDATION, settings["validation_per_task"])):
        puzzles = (benchmark_puzzle(task, index, split) for task in TASKS for index in range(count))
        scenes[split] = set().union(*(puzzle.content_hashes() for puzzle in puzzles))
    assert not scenes[BENCHMARK] & scenes[VALIDATION]


def test_every_pool_of_the_nano_default_leaves_out_the_scenes_of_the_same_questions() -> None:
    """A dataset leaves out the scenes of its own questions, so it must have all those that models are measured on."""
    counts = {}
    for name in ("shards", "long_shards"):
        settings = yaml.safe_load((CONFIGS / "nano" / f"{name}.yaml").read_text())
        counts[name] = (settings["eval_per_task"], settings["validation_per_task"])
    assert counts["long_shards"] == counts["shards"]
