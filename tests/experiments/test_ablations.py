from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from datamodules.persistence.files import read_json
from datamodules.persistence.user_error import SettingsError
from experiments import ablations, pipeline, train
from experiments.ablations import Row
from experiments.reports.ablation_summary import Comparison, Finding
from experiments.runs import metrics_csv, user_files, wandb_runs
from experiments.runs.results import read_results
from tests.experiments.conftest import ROOT, Workbench
from tests.experiments.test_pipeline import evaluation

THROUGHPUT = {"class_path": "callbacks.throughput.Throughput"}


def write_config(workbench: Workbench) -> str:
    """An ablation of the tiny model: the pipeline's stages, SFT, and GRPO from the base.

    No group of the tiny model is informative. A run that leaves all of them out would end without a model, so "cold"
    trains on their KL term.
    """
    grpo = workbench.training("grpo", [THROUGHPUT])
    few = "--model.update.skip_zero_advantage=false --trainer.max_epochs=1 --trainer.limit_train_batches=2"
    rows = {
        "sft": {"start": "base", "config": workbench.training("sft")},
        "cot_sft": {"start": "base", "config": workbench.training("cot_sft")},
        "cold": {"start": "base", "config": grpo, "without": ["Throughput"], "overrides": few},
        "grpo": {"start": "cot_sft", "config": grpo},
    }
    settings = {"experiment": "tiny", "model": str(workbench.model), "outputs": str(workbench.outputs)}
    settings["evaluation"] = workbench.write_yaml("eval", evaluation(workbench))
    comparisons = [{"row": "grpo", "over": "sft", "at_least": 9.04}, {"row": "grpo", "over": "cot_sft"}]
    path = workbench.root / "ablations.yaml"
    path.write_text(yaml.safe_dump(settings | {"rows": rows, "comparisons": comparisons}, sort_keys=False))
    return str(path)


ROWS = {
    "sft": Row("base", "sft.yaml"),
    "cot_sft": Row("base", "cot_sft.yaml"),
    "grpo": Row("cot_sft", "grpo.yaml"),
    "more": Row("grpo", "grpo.yaml"),
}


def test_a_row_brings_those_that_it_starts_from() -> None:
    assert ablations.wanted_rows(ROWS, None) == set(ROWS)
    assert ablations.wanted_rows(ROWS, ["more"]) == {"more", "grpo", "cot_sft"}
    assert ablations.wanted_rows(ROWS, ["base"]) == ablations.wanted_rows(ROWS, []) == set()


def test_every_row_that_is_not_there_is_named() -> None:
    rows = {"grpo": Row("cot_sft", "grpo.yaml"), "cot_sft": Row("base", "cot_sft.yaml")}
    with pytest.raises(ValueError) as caught:
        findings = [Finding("RL helps", "grpo", "cot_sft"), Finding("more", "grpo", "ful", figure="average")]
        ablations.check_rows(rows, [Comparison("grpo", "ful")], findings, ["sfft"])
    for text in (
        "'RL helps' needs {row: grpo, over: cot_sft}",
        "figure='average' must be one of avg",
        "rows.grpo: start='cot_sft'",
        "comparisons: no row 'ful'",
        "only: no row 'sfft'",
    ):
        assert text in str(caught.value)
    ablations.check_rows(ROWS, [Comparison("grpo", "base")], [Finding("", "grpo", "base")], ["sft", "base"])


def test_configurations_that_are_not_there_are_named_before_anything_runs(tmp_path: Path) -> None:
    config = tmp_path / "ablations.yaml"
    rows = {"sft": {"start": "base", "config": str(tmp_path / "sfft.yaml")}}
    settings = {"experiment": "tiny", "model": "m", "evaluation": str(tmp_path / "evl.yaml"), "rows": rows}
    config.write_text(yaml.safe_dump(settings | {"outputs": str(tmp_path / "outputs")}))
    with pytest.raises(SystemExit, match=r"evaluation='.*evl\.yaml', rows\.sft\.config='.*sfft\.yaml'"):
        ablations.main(["--config", str(config)])
    assert not (tmp_path / "outputs").exists()


def test_a_seed_that_no_run_can_have_is_named_before_the_seeds_before_it_are_trained() -> None:
    with pytest.raises(SettingsError, match="seed=-1 must be in 0 to"):
        ablations.run("tiny", "m", "eval.yaml", {"sft": Row("base", "sft.yaml")}, seeds=[0, -1])


@pytest.mark.parametrize("name", ["grpo.v2", "../grpo", ""])
def test_a_row_whose_folder_no_report_would_find_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match="must be a folder name without a dot"):
        ablations.run("tiny", "m", "eval.yaml", {name: Row("base", "sft.yaml")})


def test_a_derived_configuration_lacks_only_what_is_left_out(workbench: Workbench) -> None:
    config, home = workbench.training("grpo", [THROUGHPUT]), workbench.outputs / "tiny-ablations"
    assert ablations.row_config("grpo", Row("base", config), home) == config
    path = ablations.row_config("cold", Row("base", config, ["Throughput", "SaveOnInterrupt"]), home)
    settings, derived = (yaml.safe_load(Path(file).read_text()) for file in (config, path))
    names = [callback["class_path"].split(".")[-1] for callback in derived["trainer"].pop("callbacks")]
    assert names == ["MergeAdapter", "WindowCheckpoint"]
    settings["trainer"].pop("callbacks")
    assert derived == settings
    with pytest.raises(ValueError, match=r"rows.cold: without=\['Througput'\]"):
        ablations.row_config("cold", Row("base", config, ["Througput"]), home)


def test_a_row_lays_yaml_files_over_its_configuration(workbench: Workbench, tmp_path: Path) -> None:
    config, home = workbench.training("grpo", [THROUGHPUT]), workbench.outputs / "tiny-ablations"
    (tmp_path / "a.yaml").write_text("model: {init_args: {loss: {ratio: sequence, clip_low: 0.1}}}\n")
    (tmp_path / "b.yaml").write_text("model: {init_args: {loss: {clip_low: null}}}\ntrainer: {max_steps: 7}\n")
    row = Row("base", config, ["Throughput"], changes=[str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    path = Path(ablations.row_config("gspo", row, home))
    assert path.read_text().splitlines()[0].endswith("a.yaml, " + str(tmp_path / "b.yaml") + " without Throughput")
    settings, derived = yaml.safe_load(Path(config).read_text()), yaml.safe_load(path.read_text())
    loss = settings["model"]["init_args"].get("loss", {}) | {"ratio": "sequence", "clip_low": None}
    assert derived["model"]["init_args"] == settings["model"]["init_args"] | {"loss": loss}
    assert derived["trainer"]["max_steps"] == 7
    assert "Throughput" not in str(derived["trainer"]["callbacks"])


@pytest.mark.parametrize("path", ["callbacks.throughput.Throughput", {"class_path": "callbacks.throughput.Throughput"}])
def test_a_row_leaves_out_a_callback_that_is_given_without_a_list_or_by_its_path_alone(tmp_path: Path, path) -> None:
    for given, kept in ((path, []), ([path, "callbacks.b.Kept"], [{"class_path": "callbacks.b.Kept"}])):
        config = tmp_path / "sft.yaml"
        config.write_text(yaml.safe_dump({"trainer": {"callbacks": given}}))
        written = ablations.row_config("sft", Row("base", str(config), without=["Throughput"]), tmp_path / "home")
        assert yaml.safe_load(Path(written).read_text()) == {"trainer": {"callbacks": kept}}


def test_a_row_that_is_copied_finds_the_rewards_beside_its_own_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(user_files.ALSO, "")
    for folder, text in (("mine", "trainer: {}"), ("more", "phase: grpo")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "row.yaml").write_text(text)
        (tmp_path / folder / f"{folder}_rewards.py").write_text("")
    row = Row("base", str(tmp_path / "mine/row.yaml"), changes=[str(tmp_path / "more/row.yaml")])
    path = ablations.row_config("grpo", row, tmp_path / "tiny-ablations")
    code = "import sys; from experiments.runs.user_files import find_user_files; find_user_files(sys.argv[1:])"
    command = [sys.executable, "-c", f"{code}; import mine_rewards, more_rewards", "--config", path]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_rows_share_a_wandb_group_and_keep_the_users_tags(
    workbench: Workbench, logged: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "mine")
    for name, value in wandb_runs.wandb_environment("tiny-ablations", "seed1", "cold").items():
        monkeypatch.setenv(name, value)
    train.main(["--config", workbench.training("sft")])
    last = logged[-1]
    assert (last["group"], last["job_type"]) == ("tiny-ablations", "sft")
    assert last["tags"] == ("mine", "seed1", "cold", "tiny", "sft")


def test_a_summary_is_logged_once_for_each_content(workbench: Workbench, logged: list[dict]) -> None:
    folder = workbench.outputs / "tiny-ablations" / "summary"
    tables = {"Rows": [["row", "AVG"], ["grpo", "80.00"]]}
    for avg in (80.0, 80.0, 81.0):
        wandb_runs.log_summary(folder, {"grpo/avg": avg}, tables)
    first, second = logged
    assert (first["group"], first["job_type"], first["grpo/avg"]) == ("tiny-ablations", "summary", 80)
    assert first["id"] == second["id"] and second["grpo/avg"] == 81 and second["Rows"].data == [["grpo", "80.00"]]


@pytest.mark.slow
def test_rows_are_run_once_each_and_compared_after_a_kill(workbench: Workbench, capfd) -> None:
    config = write_config(workbench)
    folder, home = workbench.outputs / "tiny", workbench.outputs / "tiny-ablations"
    kill_when_done(["--config", config, "--only=[cold]"], folder / "base" / "evaluated.json")
    ablations.main(["--config", config, "--only=[cold]"])
    assert capfd.readouterr().out.count("base was done before") == 1
    assert stage_names(folder) == ["base", "cold"]
    resolved = yaml.safe_load((folder / "cold" / "config.yaml").read_text())
    names = [callback["class_path"].split(".")[-1] for callback in resolved["trainer"]["callbacks"]]
    assert "Throughput" not in names and "MergeAdapter" in names
    equal = metrics_csv.read_curve(metrics_csv.read_rows(folder / "cold"), "grpo/frac_zero_advantage")
    assert [share for _, share in equal] == [1.0, 1.0]

    ablations.main(["--config", config])
    printed = capfd.readouterr().out
    assert printed.count("was done before") == 2
    assert re.search(r"grpo +0.00 +\+0.00 +cot_sft ", printed), "the gain is over the row that it starts from"
    assert stage_names(folder) == ["base", "sft", "cot_sft", "cold", "grpo"]

    pipeline.main([f"--{key}={value}" for key, value in read_pipeline(config).items()])
    assert capfd.readouterr().out.count("done before") == 5, "the pipeline's stages are rows"
    assert stage_names(folder) == ["base", "cot_sft", "grpo"]
    ablations.main(["--config", config, "--only=[]"])
    assert capfd.readouterr().out.count("was done before") == 5, "rows that are not asked for stay where they are done"
    summary = read_json(home / "ablations.json")
    assert summary["comparisons"][0]["reached"] is False
    assert summary["comparisons"][1]["differences"]["avg"]["p"] == 1
    assert "Not there yet" not in (home / "ablations.md").read_text()


def kill_when_done(args: list[str], marker: Path) -> None:
    """Start the ablation, and end it and all that it started with kill -9 when the step of this marker is done."""
    command = [sys.executable, "-m", "experiments.ablations", *args]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        while not read_json(marker).get("done"):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stage_names(folder: Path) -> list[str]:
    return [stage.name for stage in read_results(folder / "results.json").stages]


def read_pipeline(config: str) -> dict[str, object]:
    """The settings of a pipeline whose stages are the ablation's rows."""
    settings = yaml.safe_load(Path(config).read_text())
    stages = {name: settings["rows"][name]["config"] for name in ("cot_sft", "grpo")}
    return {key: settings[key] for key in ("experiment", "model", "evaluation", "outputs")} | {"stages": stages}
