"""Local sweeps end, survive kills at any moment, stop bad trials and record failures. Trials are real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml

from datamodules.persistence.durations import Outlook
from datamodules.persistence.files import read_json, write_json
from experiments import sweep
from experiments.runs.changes import Choice, CodeChanged, OtherRun
from experiments.sweeps import trials
from experiments.sweeps.plan import read_plan
from experiments.sweeps.trials import last_words, points_agreed
from tests.experiments.conftest import Workbench, kill_all
from tests.experiments.sweep_trial import LIMIT_SECONDS, num_seen
from tests.experiments.sweeps.test_plan import CONFIGS, write

COMMAND = ["${interpreter}", "-m", "tests.experiments.sweep_trial", "${args}"]
HEIGHTS = {"height": {"distribution": "uniform", "min": 0.0, "max": 10.0}, "slope": {"values": [0, 1]}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.02)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """run("--trials=2", method="grid", …) runs the sweep in this process; its sweep.json."""
    monkeypatch.setattr(sweep.wandb_sweep, "log_sweep", lambda *_: None)  # tested with the real trials, below

    def start(*arguments: str, **changes: Any) -> dict[str, Any]:
        settings = {"metric": {"name": "score", "goal": "maximize"}, "parameters": HEIGHTS, "command": COMMAND}
        config = write(tmp_path, **settings | changes)
        sweep.main(["--config", str(config), "--outputs", str(tmp_path / "outputs"), *arguments])
        return read_json(tmp_path / "outputs/tiny-sweep/sweep.json")

    return start


def starts(folder: Path) -> list[str]:
    """The attempts of all trials, as trial/attempt."""
    return sorted(f"{path.parts[-3]}/{path.name}" for path in folder.glob("trial-*/attempts/*"))


def test_a_sweep_ends_with_the_best_trial_and_is_done_once(run, tmp_path: Path) -> None:
    summary = run()
    folder = tmp_path / "outputs/tiny-sweep"
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 3
    for trial in summary["trials"]:
        height, slope = trial["parameters"]["height"], trial["parameters"]["slope"]
        assert [step for step, _ in trial["points"]] == [1, 2, 3, 4]
        assert trial["value"] == pytest.approx(height + 4 * slope)
    assert summary["best"]["value"] == max(trial["value"] for trial in summary["trials"])
    assert f"--phase trial-{summary['best']['trial']}" in summary["best"]["command"]
    assert (folder / "sweep.md").is_file() and (folder / "sweep.html").is_file()
    assert run() == summary and len(starts(folder)) == 3, "nothing is run again"
    longer = run("--trials=4")
    assert longer["trials"][:3] == summary["trials"] and len(longer["trials"]) == 4


def test_a_grid_is_run_once_and_whole(run) -> None:
    parameters = {"height": {"values": [1, 2]}, "slope": {"values": [0, 1]}, "pace": {"value": 0.0}}
    summary = run(method="grid", run_cap=None, parameters=parameters)
    seen = [(trial["parameters"]["height"], trial["parameters"]["slope"]) for trial in summary["trials"]]
    assert sorted(seen) == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_sweep_without_an_end_is_refused(run) -> None:
    with pytest.raises(SystemExit, match="set run_cap in the YAML, or --trials"):
        run(run_cap=None)


def test_another_sweep_of_the_same_name_is_refused_or_moves_the_old_one_aside(run, tmp_path: Path) -> None:
    run("--trials=1")
    with pytest.raises(SystemExit, match="maximize: true -> false"):
        run("--trials=1", metric={"name": "score", "goal": "minimize"})
    run("--trials=1", "--redo", metric={"name": "score", "goal": "minimize"})
    assert len(list((tmp_path / "outputs").glob("tiny-sweep*"))) == 2
    assert starts(tmp_path / "outputs/tiny-sweep") == ["trial-0/0"]


def test_values_of_another_model_other_shards_or_other_questions_are_not_gone_on_with(tmp_path: Path) -> None:
    model, shards = tmp_path / "model/config.json", tmp_path / "shards/manifest.json"
    questions, held_out = tmp_path / "MIG-Bench/MIG_data.json", tmp_path / "held_out/manifest.json"
    own = tmp_path / "squares/manifest.json"
    for file in (model, shards, questions, held_out, own):
        write_json(file, {"version": 1})
    settings = {"model": {"init_args": {"model": str(model.parent)}}, "data": {"shards": str(shards.parent)}}
    measures = {"class_path": "callbacks.mig_bench.MIGBench", "init_args": {"annotations": str(questions)}}
    loss = {"class_path": "callbacks.held_out_loss.HeldOutLoss", "init_args": {"shards": [str(held_out.parent)]}}
    evaluates = {"class_path": "callbacks.benchmark_evaluation.BenchmarkEvaluation"}
    evaluates["init_args"] = {"benchmark": str(own.parent)}
    settings["trainer"] = {"callbacks": [{"class_path": "callbacks.run_progress.Progress"}, measures, loss, evaluates]}
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(settings))
    command = ["${interpreter}", "-m", "experiments.train", "--config", str(tmp_path / "trial.yaml"), "${args}"]
    plan, folder = read_plan(write(tmp_path, command=command)), tmp_path / "outputs/tiny-sweep"

    def trials_there(choice: Choice | None = None) -> int:
        return len(sweep.LocalSweep(plan, folder, 0, 3, choice=choice).log.trials)

    assert trials_there() == 0
    sweep.LocalSweep(plan, folder, 0, 3).log.begin({"model.init_args.loss.kl_beta": 0.1})
    assert trials_there() == 1
    for file in (model, shards, questions, held_out, own):
        write_json(file, {"version": 2})
        with pytest.raises(OtherRun, match=rf"inputs\.{file if file == questions else file.parent}: \w+ -> \w+"):
            trials_there()
        write_json(file, {"version": 1})
    assert trials_there() == 1
    started = read_json(folder / "started.json")
    del started["settings"]["inputs"]
    early = {"key": "that of an earlier version, which did not note them", "code": {"experiments/sweep.py": "early"}}
    write_json(folder / "started.json", started | early)
    write_json(folder / "trials.jsonl.key", {"key": "another one too"})
    with pytest.raises(CodeChanged, match="settings that only one of the two has: inputs"):
        trials_there()
    assert trials_there("keep") == trials_there() == 1, "its trials are kept"


def test_a_class_that_a_flag_of_the_trials_names_is_among_the_code_of_a_sweep(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("near", "far"):
        (tmp_path / f"{name}.py").write_text(f"class {name.title()}: ...")
    command = ["${interpreter}", "-m", "experiments.train", "--trainer.callbacks+=near.Near", "${args}"]
    plan = read_plan(write(tmp_path, command=command, parameters={"model": {"values": ["m.GRPO", "far.Far"]}}))
    sweep.LocalSweep(plan, tmp_path / "outputs/tiny-sweep", 0, 3)
    assert {"near.py", "far.py"} <= read_json(tmp_path / "outputs/tiny-sweep/started.json")["code"].keys()


@pytest.mark.parametrize("more", [{"pace": {"value": 0.0}}, {"slope": None}])
def test_a_sweep_of_more_or_fewer_parameters_is_another_sweep_and_loses_no_trial(run, tmp_path: Path, more) -> None:
    run("--trials=1")
    journal = tmp_path / "outputs/tiny-sweep/trials.jsonl"
    trials_there = journal.read_text()
    parameters = {name: fields for name, fields in (HEIGHTS | more).items() if fields is not None}
    for choice in ([], ["--keep"]):
        with pytest.raises(SystemExit, match=r"parameters\.\w+: .*not there"):
            run("--trials=1", *choice, parameters=parameters)
    assert journal.read_text() == trials_there


def test_a_trial_that_lags_is_stopped_by_sigterm_and_kept_as_pruned(run, tmp_path: Path) -> None:
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    parameters = {"height": {"values": [9, 1]}, "steps": {"value": 12}, "pace": {"value": 0.0}, "watched": {"value": 1}}
    summary = run("--seed=1", method="grid", run_cap=None, parameters=parameters, early_terminate=early)
    heights = [trial["parameters"]["height"] for trial in summary["trials"]]
    assert heights == [9, 1], "the seed must bring the better one first"
    assert [trial["state"] for trial in summary["trials"]] == ["complete", "pruned"]
    assert summary["trials"][1]["value"] is None and 2 <= len(summary["trials"][1]["points"]) < 11
    assert (tmp_path / "outputs/tiny-sweep/trial-1/stopped").is_file()


def test_a_failed_trial_is_recorded_with_its_message_and_the_sweep_goes_on(run) -> None:
    parameters = {"height": {"values": [1, 2]}, "fault": {"values": [0, 1]}, "pace": {"value": 0.0}}
    summary = run(method="grid", run_cap=None, parameters=parameters)
    assert len(summary["trials"]) == 4
    for trial in summary["trials"]:
        failed = trial["parameters"]["fault"] == 1
        assert trial["state"] == ("failed" if failed else "complete")
        assert (f"ValueError: height={trial['parameters']['height']}" in trial["message"]) == failed


def test_three_failures_at_the_start_end_the_sweep_until_they_are_retried(run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"first 3 trials failed; .*trial-2\.log: exit code 1: ValueError: height"):
        run("--trials=6", parameters=HEIGHTS | {"fault": {"value": 1}})
    folder = tmp_path / "outputs/tiny-sweep"
    assert len(starts(folder)) == 3
    with pytest.raises(SystemExit, match="first 3"):
        run("--trials=6", "--retry_failed", parameters=HEIGHTS | {"fault": {"value": 1}})
    assert starts(folder) == [f"trial-{trial}/{attempt}" for trial in range(3) for attempt in range(2)]


def test_a_metric_that_is_never_logged_is_a_failure_that_says_so(run) -> None:
    summary = run("--trials=1", metric={"name": "other"})
    assert summary["trials"][0]["message"] == "it logged no finite other" and summary["best"] is None


def test_a_killed_trial_goes_on_once_and_fails_when_killed_again(run, tmp_path: Path) -> None:
    parameters = {"die": {"values": [0, 1, 2]}, "height": {"value": 1}, "pace": {"value": 0.4}}
    summary = run(method="grid", run_cap=None, parameters=parameters)
    states = {trial["parameters"]["die"]: trial for trial in summary["trials"]}
    assert [states[k]["state"] for k in range(3)] == ["complete", "complete", "failed"]
    assert states[1]["points"] == states[0]["points"], "from its own checkpoint"
    assert "exit code -9" in states[2]["message"]
    assert states[1]["seconds"] > 4 * 0.4, "the time of both attempts"


def test_a_trial_that_diverged_at_the_end_has_failed(run) -> None:
    parameters = {"height": {"value": 1}, "diverge": {"values": [0, 1]}, "pace": {"value": 0.0}}
    summary = run(method="grid", run_cap=None, parameters=parameters)
    states = {trial["parameters"]["diverge"]: trial for trial in summary["trials"]}
    assert (states[0]["state"], states[1]["state"]) == ("complete", "failed")
    assert states[1]["message"] == "its last score is nan" and states[1]["value"] is None


def test_trials_keep_the_users_tags_and_have_a_wandb_service_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_TAGS", "mine,sweep")
    monkeypatch.setenv("WANDB_SERVICE", "3-4711-tcp-localhost-1")  # of a process that has logged something itself
    variables = trials.trial_environment(("sweep", "bayes"), Outlook("trial 1 of 2", began=0.0))
    assert variables["WANDB_TAGS"] == "mine,sweep,bayes"
    assert "WANDB_SERVICE" not in variables


def wait_for_points(folder: Path, trial: int, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if (folder / "trials.jsonl").is_file() and num_seen(folder, f"trial-{trial}") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder}: trial {trial} did not log {count} values; exit code {process.poll()}")


def without_seconds(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: trial[key] for key in ("state", "value", "parameters", "points")} for trial in summary["trials"]]


def test_a_killed_sweep_goes_on(run, start_apart, tmp_path: Path) -> None:
    parameters = HEIGHTS | {"pace": {"value": 0.0}}
    settings = {"metric": {"name": "score", "goal": "maximize"}, "parameters": parameters, "command": COMMAND}
    config, folder = write(tmp_path, **settings, method="bayes"), tmp_path / "outputs/tiny-sweep"
    killed = start_apart(config, tmp_path / "outputs", poll=0.05, hold="trial-1")
    wait_for_points(folder, 1, 1, killed)
    kill_all(killed)
    resumed = run(method="bayes", parameters=parameters)
    assert starts(folder) == ["trial-0/0", "trial-1/0", "trial-1/1", "trial-2/0"]
    for state in folder.glob("*"):
        state.rename(tmp_path / state.name)
    assert without_seconds(resumed) == without_seconds(run(method="bayes", parameters=parameters))


@pytest.mark.slow
def test_a_killed_sweep_ends_as_one_left_alone(start_apart, tmp_path: Path) -> None:
    early = {"type": "hyperband", "min_iter": 3, "eta": 2}
    parameters = HEIGHTS | {"pace": {"value": 0.0}, "steps": {"value": 12}, "watched": {"value": 1}}
    settings = {"metric": {"name": "score", "goal": "maximize"}, "parameters": parameters, "command": COMMAND}
    config = write(tmp_path, **settings, early_terminate=early, method="bayes")
    start = partial(start_apart, config, poll=0.05)
    whole, outputs, folder = start(tmp_path / "whole"), tmp_path / "killed", tmp_path / "killed/tiny-sweep"
    killed = start(outputs, hold="trial-1")
    wait_for_points(folder, 1, 1, killed)
    kill_all(killed)
    interrupted = starts(folder)
    stopped = start(outputs, hold="trial-2")
    wait_for_points(folder, 2, 1, stopped)
    stopped.terminate()
    assert stopped.wait(LIMIT_SECONDS) == 1
    assert (folder / "trial-2/stopped").is_file(), "SIGTERM is passed on to the trial"
    assert start(outputs).wait(LIMIT_SECONDS) == 0
    assert whole.wait(LIMIT_SECONDS) == 0
    assert interrupted == ["trial-0/0", "trial-1/0"]
    assert starts(folder) == ["trial-0/0", "trial-1/0", "trial-1/1", "trial-2/0", "trial-2/1"]
    expected = without_seconds(read_json(tmp_path / "whole/tiny-sweep/sweep.json"))
    assert without_seconds(read_json(folder / "sweep.json")) == expected
    assert "pruned" in [trial["state"] for trial in expected]
    assert list((folder / "wandb").glob("offline-run-*"))


def test_without_a_key_nothing_can_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="takes a W&B key"):
        sweep.main(["--join", "entity/project/id"])


def test_with_a_key_a_sweep_is_created_once_and_an_agent_started(tmp_path: Path, monkeypatch) -> None:
    created, started = [], []
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "sweep", lambda what, **where: created.append((what, where)) or f"s{len(created)}")
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="lab"))
    monkeypatch.setattr(sweep.wandb_sweep, "run_agent", lambda *what: started.append(what) or sys.exit())
    config = CONFIGS / "nano/sweep.yaml"
    for _ in range(2):
        with pytest.raises(SystemExit):
            sweep.main(["--config", str(config), "--outputs", str(tmp_path)])
    assert started == [("lab/multi-image-grounding/s1", None)] * 2
    assert created == [(yaml.safe_load(config.read_text()), {"entity": "lab", "project": "multi-image-grounding"})]


def test_points_are_taken_where_two_looks_agree() -> None:
    assert points_agreed([(1, 2.0), (2, 3.0)], [(1, 2.0), (2, 3.0), (3, 4.0)]) == [(1, 2.0), (2, 3.0)]
    assert points_agreed([(1, 2.0), (2, 3.5)], [(1, 2.0), (2, 3.0)]) == [(1, 2.0)]
    assert points_agreed([], [(1, 2.0)]) == [] == points_agreed([(1, 2.0)], [])


def test_the_error_is_found_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("start\nTraceback:\n  File x\nValueError: the loss is nan\nwandb: synced\nbye\n")
    assert last_words(log) == "ValueError: the loss is nan"
    log.write_text("settings cannot be run:\n  - beta=-1.0 is negative\n")
    assert last_words(log) == "- beta=-1.0 is negative"
    assert last_words(tmp_path / "none") == "it said nothing"


def real_sweep(workbench: Workbench, count: int, **model: Any) -> Path:
    """The YAML of a sweep over λ and β with real GRPO trials of the tiny model, of three updates each."""
    callback = {
        "class_path": "callbacks.mig_bench.MIGBench",
        "init_args": workbench.benchmark | {"after": True, "every_n_steps": 1, "max_new_tokens": 4},
    }
    config = workbench.training("grpo", [callback], **model)
    command = ["${env}", "${interpreter}", "-m", "tests.experiments.text_reward", f"--config={config}"]
    command += ["--trainer.max_steps=3", "--phase=trial-$WANDB_RUN_ID", "${args}"]
    prefix = "model.init_args."
    parameters = {
        prefix + "reward_weights.accuracy": {"values": [0.5, 1.0, 2.0]},
        prefix + "reward_weights.format": {"values": [0.0, 0.5]},
        prefix + "loss.kl_beta": {"distribution": "log_uniform_values", "min": 1e-3, "max": 0.5},
    }
    metric = {"name": "mig_bench_val/mean_tokens", "goal": "minimize"}  # of an untrained model no box can be read
    return write(
        workbench.root, name="lambda-beta", metric=metric, parameters=parameters, command=command, run_cap=count
    )


def test_two_real_trials_end_and_log_to_wandb(workbench: Workbench) -> None:
    config = real_sweep(workbench, 2)
    sweep.main(["--config", str(config), "--outputs", str(workbench.outputs)])
    folder = workbench.outputs / "lambda-beta"
    summary = read_json(folder / "sweep.json")
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 2, summary
    # After the updates 1 and 2 on some questions, after the third on all.
    assert all(len(trial["points"]) == 3 and trial["value"] == trial["points"][-1][1] for trial in summary["trials"])
    after = read_json(folder / "trial-1/mig_bench/after/result.json")
    assert summary["trials"][1]["value"] == after["mean_tokens"] and after["n"] == 4
    assert list((folder / "wandb").glob("offline-run-*")) and list((folder / "trial-0/wandb").glob("offline-run-*"))
    assert not (folder / "trial-0/rejection_sampling").exists()


@pytest.mark.slow
def test_eight_real_trials_over_lambda_and_beta_survive_a_kill(workbench: Workbench, start_apart, browser_page) -> None:
    config = real_sweep(workbench, 8)
    folder = workbench.outputs / "lambda-beta"
    killed = start_apart(config, workbench.outputs)
    rows = folder / "trial-3/attempts/0/metrics.jsonl"  # the sweep itself looks seldom: a short trial has ended by then
    end = time.monotonic() + 1200
    while not (rows.is_file() and rows.read_text()):
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    kill_all(killed)
    assert start_apart(config, workbench.outputs).wait(2400) == 0
    summary = read_json(folder / "sweep.json")
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 8, summary
    assert all(len(trial["points"]) == 3 for trial in summary["trials"])
    assert len(starts(folder)) == 9, "the interrupted trial went on, nothing else was run twice"
    browser_page.goto((folder / "sweep.html").as_uri())
    assert browser_page.locator(".js-plotly-plot").count() >= 4
