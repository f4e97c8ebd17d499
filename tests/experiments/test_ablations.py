from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from datamodules.artefacts import read_json
from experiments import ablations, metrics, pipeline
from experiments.results import read_results
from tests.experiments.conftest import Workbench
from tests.experiments.test_pipeline import evaluation

THROUGHPUT = {"class_path": "callbacks.throughput.Throughput"}


def write_config(workbench: Workbench) -> str:
    """An ablation of the tiny model: the pipeline's stages, SFT, and GRPO from the base, which never counts a step."""
    grpo = workbench.training("grpo", [THROUGHPUT])
    few = "--model.skip_equal_groups=true --trainer.max_epochs=1 --trainer.limit_train_batches=2"
    rows = {
        "sft": {"start": "base", "config": workbench.training("sft")},
        "cot_sft": {"start": "base", "config": workbench.training("cot_sft")},
        "cold": {"start": "base", "config": grpo, "without": ["Throughput"], "overrides": few},
        "grpo": {"start": "cot_sft", "config": grpo},
    }
    settings = {"experiment": "tiny", "model": str(workbench.model), "outputs": str(workbench.outputs)}
    settings["evaluation"] = workbench.write_yaml("eval", evaluation(workbench))
    comparisons = [{"row": "grpo", "over": "sft", "at_least": 9.04}, {"row": "grpo", "over": "cot_sft"}]
    return workbench.write_yaml("ablations", settings | {"rows": rows, "comparisons": comparisons})


@pytest.mark.slow
def test_rows_are_run_once_each_and_compared(workbench: Workbench, capfd) -> None:
    config = write_config(workbench)
    ablations.main(["--config", config, "--seeds=[0]", "--only=[cold]"])
    folder, home = workbench.outputs / "tiny", workbench.outputs / "tiny-ablations"
    assert [stage.name for stage in read_results(folder / "results.json").stages] == ["base", "cold"]
    resolved = yaml.safe_load((folder / "cold" / "config.yaml").read_text())
    names = [callback["class_path"].split(".")[-1] for callback in resolved["trainer"]["callbacks"]]
    assert "Throughput" not in names and "MergeAdapter" in names
    equal = metrics.read_curve(metrics.read_rows(folder / "cold"), "grpo/frac_zero_advantage")
    assert [share for _, share in equal] == [1.0, 1.0], "no step counted, and yet there is a model"
    capfd.readouterr()
    ablations.main(["--config", config, "--seeds=[0]"])
    assert capfd.readouterr().out.count("done before") == 3
    assert [stage.name for stage in read_results(folder / "results.json").stages] == [
        "base", "sft", "cot_sft", "cold", "grpo",
    ]  # fmt: skip
    stages = read_yaml_stages(config)
    pipeline.main([f"--{key}={value}" for key, value in stages.items()])
    assert capfd.readouterr().out.count("done before") == 5, "the pipeline's stages are rows"
    ablations.main(["--config", config, "--seeds=[0]", "--only=[]"])
    assert capfd.readouterr().out.count("done before") == 9, "rows that are not asked for stay where they are done"
    summary = read_json(home / "ablations.json")
    assert summary["comparisons"][0]["reached"] is False
    assert summary["comparisons"][1]["differences"]["avg"]["p"] == 1


def read_yaml_stages(config: str) -> dict[str, str]:
    settings = yaml.safe_load(Path(config).read_text())
    stages = {name: settings["rows"][name]["config"] for name in ("cot_sft", "grpo")}
    return {key: settings[key] for key in ("experiment", "model", "evaluation", "outputs")} | {"stages": stages}
