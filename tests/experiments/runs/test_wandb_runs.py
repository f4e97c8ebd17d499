"""What W&B is given: enough to find and compare ablations, and no metric that docs/metrics.md does not define."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from experiments import evaluate, train
from experiments.runs.wandb_runs import wandb_identity
from tests.documented_metrics import documented_names
from tests.experiments.conftest import Workbench


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Names that were logged, tables apart, and what the latest run says of itself."""
    wandb.finish()  # a run that an earlier test in this process left open would be taken for the new one
    found: dict[str, Any] = {"names": set(), "tables": {}}
    log = wandb.Run.log

    def note(run: wandb.Run, data: dict, *args: Any, **kwargs: Any) -> None:
        found["tables"].update({name: value for name, value in data.items() if isinstance(value, wandb.Table)})
        found["names"].update(name for name in data if name not in found["tables"])
        found.update(config=dict(run.config), tags=run.tags, group=run.group, job_type=run.job_type)
        log(run, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", note)
    yield found
    wandb.finish()


@pytest.mark.parametrize("phase", ["cot_sft", "grpo"])
def test_every_name_that_a_run_logs_is_documented(workbench: Workbench, seen: dict[str, Any], phase: str) -> None:
    short = workbench.benchmark | {"max_new_tokens": 4}
    often = short | {"every_n_steps": 1, "after": True}
    callbacks = [
        {"class_path": "callbacks.previews.Previews", "init_args": short},
        {"class_path": "callbacks.mig_bench.MIGBench", "init_args": often},
        {"class_path": "callbacks.throughput.Throughput"},
    ]
    own = {"epochs_per_rollout": 2} if phase == "grpo" else {}
    train.main(["--config", workbench.training(phase, callbacks, **own), "--trainer.max_steps=4"])
    kind = {"grpo": {"reward/total", "grpo/kl", "grpo/clip_fraction"}, "cot_sft": {"train/loss", "train/tokens"}}[phase]
    always = {"mig_bench_val/avg", "mig_bench_val/diff", "speed/data_wait", "train/grad_norm", "trainer/global_step"}
    assert seen["names"] >= kind | always
    assert seen["names"] - documented_names() == set()

    assert (seen["group"], seen["job_type"], seen["tags"]) == ("tiny", phase, ("tiny", phase))
    assert seen["config"]["model"]["init_args"]["learning_rate"] == 1e-3
    assert seen["config"]["data"]["max_image_pixels"] == 64_000_000, "defaults too"
    assert len(seen["config"]["commit"]) > 6
    assert len(seen["tables"]["previews"].data) == 2, "a question of each task"


def test_an_evaluation_brings_its_settings_and_drawn_boxes(workbench: Workbench, seen: dict[str, Any]) -> None:
    settings = {"data_root": str(workbench.root), "model": str(workbench.model), "decoding": {"max_new_tokens": 4}}
    home = workbench.outputs / "tiny-seed3" / "base" / "benchmarks"
    evaluate.main(["--config", workbench.write_yaml("eval", settings | {"output": str(home)})])
    assert "mig_bench/avg" in seen["names"]
    assert "mig_bench/official_avg" not in seen["names"], "the official parser cannot read the pixels of this model"
    assert seen["names"] - documented_names() == set()
    assert seen["config"]["evaluation"]["predictor"]["decoding"]["max_new_tokens"] == 4
    assert seen["config"]["evaluation"]["commit"]
    assert set(seen["tags"]) == {"tiny", "seed3", "base"}
    pictures = seen["tables"]["previews"].get_column("preview")
    assert len(pictures) == 2 and all(isinstance(picture, wandb.Image) for picture in pictures)


@pytest.mark.parametrize(
    ("folder", "tags"),
    [
        ("outputs/nano/grpo", ["nano", "grpo"]),
        ("outputs/no-rl-seed12/sft", ["no-rl", "seed12", "sft"]),
        ("outputs/sft/sft", ["sft"]),
    ],
)
def test_tags_name_experiment_seed_and_phase(folder: str, tags: list[str], tmp_path: Path) -> None:
    assert wandb_identity(tmp_path / folder, "id")["tags"] == tags
