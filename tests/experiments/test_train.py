from __future__ import annotations

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from datamodules.persistence.files import read_json
from experiments import train
from experiments.runs import metrics_csv, run_identity, run_key, wandb_runs
from experiments.runs.command_line import train_cli
from lightning_modules.rl.rollout_log import read_index
from tests.experiments.conftest import Workbench, rolling_back, run_apart


def test_a_phase_leaves_everything_that_the_next_one_needs(workbench: Workbench, capsys) -> None:
    config = workbench.training("cot_sft")
    train.main(["--config", config, "--model.learning_rate=0.002"])
    folder = workbench.outputs / "tiny" / "cot_sft"
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["learning_rate"] == 0.002
    assert resolved["data"]["max_image_pixels"] == 64_000_000, "defaults are written out"
    assert resolved["data"]["max_sample_pixels"] == 256_000_000
    assert (folder / "merged" / "model.safetensors").is_file()
    assert [step for step, _ in metrics_csv.read_curve(metrics_csv.read_rows(folder), "train/loss")] == [0, 1]
    assert (folder / "metrics.csv").is_file()
    assert read_json(folder / "done.json")["seconds"] > 0
    assert list((folder / "wandb").glob("offline-run-*"))

    for arguments in (["--config", config, "--model.learning_rate=0.002"], ["--config", str(folder / "config.yaml")]):
        train.main(arguments)
        assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_without_callbacks_is_saved_unless_told_otherwise(workbench: Workbench, wanted: bool) -> None:
    config = Path(workbench.training("cot_sft"))
    settings = yaml.safe_load(config.read_text())
    settings["trainer"] |= {"callbacks": [], "max_epochs": 1, "max_steps": -1}
    config.write_text(yaml.safe_dump(settings | {"phase": f"saved_{wanted}"}))
    more = [] if wanted else ["--trainer.enable_checkpointing=false"]
    train.main(["--config", str(config), "--trainer.logger=false", *more])
    folder = workbench.outputs / "tiny" / f"saved_{wanted}"
    assert (folder / "done.json").is_file()
    assert len(list(folder.rglob("*.ckpt"))) == wanted
    assert all(file.parent == folder / "checkpoints" for file in folder.rglob("*.ckpt"))


def test_other_settings_are_refused_and_with_redo_the_old_run_is_moved_aside(workbench: Workbench, capsys) -> None:
    config = workbench.training("cot_sft")
    arguments = ["--config", config, "--trainer.logger=false", "--trainer.max_steps=1"]
    train.main(arguments)
    key = read_json(workbench.outputs / "tiny" / "cot_sft" / "done.json")["key"]
    for more in ([], ["--check_without=[]"], ["--keep"]):
        with pytest.raises(SystemExit) as refused:
            train.main([*arguments, "--seed_everything=1", *more])
        message = str(refused.value.code)
        assert len(message.splitlines()) <= 5 and "finished; nothing was moved" in message
        assert "  seed_everything: 0 -> 1\n" in message and "--experiment NAME" in message and "REDO=1" in message
        assert read_json(workbench.outputs / "tiny" / "cot_sft" / "done.json")["key"] == key
    capsys.readouterr()
    train.main([*arguments, "--check_without", "[]"])
    assert capsys.readouterr().out == "", "the same run needs no answer"
    train.main([*arguments, "--seed_everything=1", "--redo"])
    assert read_json(workbench.outputs / "tiny" / f"cot_sft.{key[:8]}" / "done.json")["key"] == key
    assert read_json(workbench.outputs / "tiny" / "cot_sft" / "done.json")["key"] != key


def test_a_seed_and_an_experiment_name_the_folder_and_its_phases_start_from_each_other(
    workbench: Workbench, capsys
) -> None:
    quick = ["--trainer.logger=false", "--trainer.max_steps=1"]
    sft = ["--config", workbench.training("cot_sft"), *quick]
    train.main([*sft, "--seed", "1", "--experiment=mine"])
    home = workbench.outputs / "mine-seed1"
    assert read_json(home / "cot_sft/started.json")["settings"]["seed_everything"] == 1
    # The YAML of GRPO names the model of its own experiment.
    settings = yaml.safe_load(Path(workbench.training("grpo")).read_text())
    settings["model"]["init_args"]["model"] = str(workbench.outputs / "tiny/cot_sft/merged")
    grpo = ["--config", workbench.write_yaml("linked", settings), *quick]
    train.main([*grpo, "--experiment", "mine", "--seed=1"])
    saved = yaml.safe_load((home / "grpo/config.yaml").read_text())
    assert saved["model"]["init_args"]["model"] == str(home / "cot_sft/merged")
    with pytest.raises(SystemExit, match=r"Train mine-seed2/cot_sft first, or name another model with --model\.model="):
        train.main([*grpo, "--experiment=mine", "--seed=2"])


def test_a_run_that_other_code_has_made_is_never_already_done(workbench: Workbench, capsys, monkeypatch) -> None:
    code = {"lightning_modules/cot_sft.py": "1"}
    monkeypatch.setattr(run_key, "source_code", lambda modules: dict(code))
    arguments = ["--config", workbench.training("cot_sft"), "--trainer.logger=false", "--trainer.max_steps=1"]
    folder = workbench.outputs / "tiny" / "cot_sft"
    train.main(arguments)
    key = read_json(folder / "done.json")["key"]
    assert read_json(folder / "done.json")["code"] == code == read_json(folder / "started.json")["code"]
    train.main([*arguments, "--data.num_workers=1"])
    assert "already done" in capsys.readouterr().out, "the number of workers makes no other run"
    code["lightning_modules/cot_sft.py"] = "2"
    with pytest.raises(SystemExit, match=r"lightning_modules/cot_sft\.py\nKEEP=1 .*REDO=1") as asked:
        train.main(arguments)
    assert asked.value.code != 0 and "already done" not in capsys.readouterr().out
    train.main([*arguments, "--keep"])
    train.main(arguments)
    assert capsys.readouterr().out.count("already done") == 2, "asked once"
    train.main([*arguments, "--redo"])
    assert read_json(folder / "done.json")["code"] == code and "redo" not in (folder / "config.yaml").read_text()
    assert read_json(workbench.outputs / "tiny" / f"cot_sft.{key[:8]}" / "done.json")["key"] == key
    train.main([*arguments, "--seed_everything=1", "--redo"])
    said = capsys.readouterr().out
    assert "seed_everything: 0 -> 1" in said and f"mv {folder}.{key[:8]}+ {folder}" in said


def test_a_damaged_shard_is_counted_and_its_repair_is_another_run(workbench: Workbench, caplog, capsys) -> None:
    shards = workbench.root / "copied"
    shutil.copytree(workbench.root / "shards", shards)
    settings = yaml.safe_load(Path(workbench.training("cot_sft")).read_text())
    settings["data"] |= {"shards": str(shards)}
    config = workbench.write_yaml("copied", settings)
    arguments = ["--config", config, "--trainer.logger=false", "--trainer.max_steps=1"]
    train.main(arguments)
    tar = shards / "shard-00000.tar"
    sound = tar.read_bytes()
    with tar.open("r+b") as file:
        file.write(sound.replace(b'"ring"', b'"king"'))
    with pytest.raises(SystemExit, match=r"no usable sample in a whole epoch.*manifest_mismatch"):
        train.main(arguments)
    assert re.search(r"data\.shards: .*copied \(\w+\) -> .*copied \(\w+\)", capsys.readouterr().out)


def test_every_fault_is_told_at_once_and_before_weights_are_read(workbench: Workbench) -> None:
    config = workbench.training(
        "grpo", group_size=1, kl_beta=-1.0, minibatches=0, model=str(workbench.root / "nowhere")
    )
    more = ["--data.shards", str(workbench.root / "no_shards"), "--data.batch_size=0", "--phase=../up"]
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", config, "--trainer.accumulate_grad_batches=2", *more])
    message = str(caught.value)
    groups = ("model.rollout.group_size=1", "model.loss.kl_beta=-1.0", "model.update.minibatches=0")
    for fault in ("nowhere", "no_shards", *groups, "batch_size=0", "'../up'", "model.accumulate"):
        assert fault in message, fault
    assert "Union" not in message and len(message.splitlines()) <= 10
    assert not workbench.outputs.exists()


def test_a_checkpoint_folder_that_a_resume_would_not_look_into_is_refused(workbench: Workbench) -> None:
    class_path, elsewhere = "callbacks.checkpoints.WindowCheckpoint", str(workbench.root / "elsewhere")
    config = workbench.training("cot_sft", [{"class_path": class_path, "init_args": {"dirpath": elsewhere}}])
    with pytest.raises(SystemExit, match=f"WindowCheckpoint: dirpath='{elsewhere}'"):
        train.main(["--config", config])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_a_precision_that_would_round_adapters_or_be_ignored_is_refused(workbench: Workbench, precision: str) -> None:
    with pytest.raises(SystemExit, match=f"trainer.precision={precision}.*model.dtype"):
        train.main(["--config", workbench.training("cot_sft"), f"--trainer.precision={precision}"])


def test_refilling_without_a_number_of_updates_is_refused(workbench: Workbench) -> None:
    config = workbench.training("grpo", refill_windows=2)
    with pytest.raises(
        SystemExit, match=r"update\.refill_windows=2 with trainer\.max_steps=-1: .*Set trainer\.max_steps"
    ):
        train.main(["--config", config, "--trainer.max_steps=-1", "--trainer.max_epochs=1"])


def test_a_metrics_file_that_cannot_be_written_hides_nothing(workbench: Workbench, caplog) -> None:
    sends = {"class_path": "tests.callbacks.test_fit_callbacks.Sends", "init_args": {"signum": int(signal.SIGTERM)}}
    (workbench.outputs / "tiny/cot_sft/metrics.csv").mkdir(parents=True)  # no file
    wandb_runs.finish_run()  # one that an earlier test has left in this process
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", workbench.training("cot_sft", [sends]), "--trainer.max_steps=3"])
    assert stopped.value.code == 128 + signal.SIGTERM, "by which the pipeline and SLURM's script know it"
    assert "metrics.csv" in caplog.text


def test_an_empty_shard_list_is_named(workbench: Workbench) -> None:
    config = workbench.training("cot_sft")
    with pytest.raises(SystemExit, match=r"shards=.* names no folder"):
        train.main(["--config", config, "--data.shards=[]"])


def test_a_seed_out_of_range_is_named(workbench: Workbench) -> None:
    with pytest.raises(SystemExit, match="seed=-1 must be in 0 to"):
        train.main(["--config", workbench.training("cot_sft"), "--seed_everything=-1"])


def test_a_stop_before_the_first_checkpoint_does_not_name_one(workbench: Workbench, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_cli.Trainer, "fit", lambda *_, **__: sys.exit(1))
    with pytest.raises(SystemExit):
        train.main(["--config", workbench.training("cot_sft"), "--trainer.logger=false"])
    assert "goes on from what is saved" in capsys.readouterr().out


def test_the_key_follows_what_is_computed(workbench: Workbench) -> None:
    config = workbench.training("cot_sft")

    class Parsed(train_cli.TrainCLI):
        def before_instantiate_classes(self) -> None:
            self.key = run_key.run_key(self.settings())

        def instantiate_classes(self) -> None:
            pass

    def key(*more: str) -> str:
        return Parsed(["--config", config, *more]).key

    assert key() == key("--trainer.log_every_n_steps=7", "--trainer.logger=false", "--outputs=elsewhere")
    grpo = workbench.training("grpo")
    assert key("--config", grpo) == key("--config", grpo, "--model.rollout.log=a.jsonl", "--model.rollout.log_every=3")
    different = [key(), key("--seed_everything=1"), key("--model.learning_rate=1e-5"), key("--trainer.max_steps=3")]
    assert len(set(different)) == 4

    served = workbench.training("grpo", engine="vllm")
    keys = [
        Parsed(["--config", served, *more]).key
        for more in ((), ("--model.rollout.vllm.servers=[http://node1:8000/v1]",))
    ]
    assert keys[0] == keys[1] != Parsed(["--config", served, "--model.rollout.engine=native"]).key, "where it samples"


def test_a_phase_is_named_after_the_run_of_a_wandb_agent(workbench: Workbench) -> None:
    config, more = workbench.training("cot_sft"), ("--phase=trial-$WANDB_RUN_ID", "--trainer.max_steps=1")
    with pytest.raises(SystemExit, match=r"'trial-\$WANDB_RUN_ID' names an environment variable that is not set"):
        train.main(["--config", config, *more])
    log, chosen = workbench.root / "log.txt", workbench.root / "chosen.yaml"
    chosen.write_text("wandb_version: 1\nmodel.init_args.learning_rate:\n  value: 0.002\n")
    agent = {"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "x1y2", "WANDB_SWEEP_PARAM_PATH": chosen, "WANDB_MODE": "offline"}
    assert run_apart(config, *more, "--model.init_args.learning_rate=0.002", log=log, **agent) == 0, log.read_text()
    folder = workbench.outputs / "tiny/trial-x1y2"
    assert yaml.safe_load((folder / "config.yaml").read_text())["phase"] == "trial-x1y2"
    assert len(list((folder / "wandb").glob("offline-run-*-x1y2"))) == 1


def test_a_run_of_a_wandb_sweep_keeps_the_agent_s_id(tmp_path: Path, monkeypatch) -> None:
    own = wandb_runs.wandb_run_id(tmp_path, "0123456789")
    assert own.startswith("01234567") and wandb_runs.wandb_run_id(tmp_path, "0123456789") == own
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "x1y2")
    monkeypatch.setenv("WANDB_JOB_TYPE", "trial")
    assert wandb_runs.wandb_run_id(tmp_path, "0123456789") == "x1y2" == (tmp_path / "wandb_id").read_text()
    assert wandb_runs.wandb_identity(tmp_path / "sweep/trial-1", "x1y2")["job_type"] == "trial"


@pytest.mark.parametrize(
    "kill",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_grpo_run_ends_as_one_left_alone(workbench: Workbench, kill: signal.Signals) -> None:
    config = workbench.training("grpo")
    log = workbench.root / "log.txt"
    more = ("--trainer.max_steps=6", "--model.loss.kl_beta=0.1")

    def rollouts(phase: str) -> list[dict]:
        return [group.read() for group in read_index(workbench.outputs / "tiny" / phase / "rollouts.jsonl")]

    for phase in ("whole", "stopped"):
        arguments = (*more, f"--phase={phase}", "--model.rollout.log=rollouts.jsonl")
        if phase == "stopped":
            # Four rewards a batch: in the middle of the third.
            assert run_apart(config, *arguments, log=log, STOP_SIGNAL=int(kill), STOP_AT=10) != 0, log.read_text()
        assert run_apart(config, *arguments, log=log) == 0, log.read_text()
    assert "going on from" in log.read_text()
    assert rollouts("whole") == rollouts("stopped")
    assert [group["batch"] for group in rollouts("stopped")] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    curves = {}
    for phase in ("whole", "stopped"):
        rows = metrics_csv.read_rows(workbench.outputs / "tiny" / phase)
        curves[phase] = [metrics_csv.read_curve(rows, name) for name in ("reward/total", "grpo/loss", "grpo/kl")]
    assert curves["whole"] == curves["stopped"]
    assert any(value > 0 for _, value in curves["whole"][2]), "the policy has moved"


# Everything of the objective that changes with the updates: β, the entropy's coefficient, the reference.
MOVING = tuple(
    f"--model.loss.{setting}"
    for setting in (
        *("kl_schedule.kind=linear", "kl_schedule.final=0.3", "reference_every=3", "normalise_over=all"),
        *("entropy.coefficient=0.1", "entropy.target=100", "entropy.step=0.1"),
    )
)


@pytest.mark.parametrize("objective", [(), MOVING], ids=["as it is", "moving"])
def test_a_kill_inside_a_window_of_several_updates_repeats_the_whole_window(
    workbench: Workbench, objective: tuple[str, ...]
) -> None:
    """Windows of two batches, trained on twice in two minibatches; the kill comes in the fourth batch."""
    log = workbench.root / "log.txt"
    window = {"accumulate": 2, "epochs_per_rollout": 2, "minibatches": 2, "kl_beta": 0.1}
    config = workbench.training("grpo", **window)
    curves, weights = {}, {}
    for phase in ("whole", "stopped"):
        arguments = ("--trainer.max_steps=12", f"--phase={phase}", *objective)
        if phase == "stopped":
            assert run_apart(config, *arguments, log=log, STOP_SIGNAL=int(signal.SIGKILL), STOP_AT=14) != 0
            assert [step for step, _ in metrics_csv.read_curve(reported(workbench, phase), "grpo/entropy")] == [1]
        assert run_apart(config, *arguments, log=log) == 0, log.read_text()
        curves[phase] = [without_times(row) for row in reported(workbench, phase)]
        weights[phase] = (workbench.outputs / "tiny" / phase / "merged/model.safetensors").read_bytes()
    assert "step-00000004.ckpt" in log.read_text()
    assert len(curves["whole"]) == 6 and curves["whole"] == curves["stopped"]
    moving = [len({row.get(f"grpo/{name}") for row in curves["whole"]}) for name in ("kl_beta", "entropy_coefficient")]
    assert all(number > 2 for number in moving) == bool(objective)
    assert weights["whole"] == weights["stopped"]


def reported(workbench: Workbench, phase: str) -> metrics_csv.Rows:
    return metrics_csv.read_rows(workbench.outputs / "tiny" / phase)


def without_times(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if not name.startswith("speed/")}


def test_attempts_of_one_phase_are_one_wandb_run(workbench: Workbench) -> None:
    config, log = workbench.training("grpo"), workbench.root / "log.txt"
    more = ("--trainer.max_steps=4",)
    assert run_apart(config, *more, log=log, STOP_SIGNAL=int(signal.SIGKILL), STOP_AT=10) != 0, log.read_text()
    assert run_apart(config, *more, log=log) == 0, log.read_text()
    folder = workbench.outputs / "tiny" / "grpo"
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2, "one for each attempt"
    assert {run.name.split("-")[-1] for run in runs} == {(folder / "wandb_id").read_text()}


def test_a_run_that_is_rolled_back_goes_on_in_the_same_process(workbench: Workbench, capsys) -> None:
    wandb_runs.finish_run()  # one that an earlier test has left in this process
    with pytest.raises(SystemExit, match="stopped after 1 rollbacks"):
        train.main(["--config", rolling_back(workbench), "--trainer.max_steps=6", "--model.loss.kl_beta=0.1"])
    folder = workbench.outputs / "tiny" / "grpo"
    assert [event["action"] for event in read_json(folder / "collapse.json")["events"]] == ["roll_back", "stop"]
    assert capsys.readouterr().out.count("going on from") == 1
    assert [value for _, value in metrics_csv.read_curve(metrics_csv.read_rows(folder), "collapse/rollbacks")][
        -1
    ] == 1.0
    assert not (folder / "done.json").exists()


def test_a_full_disk_at_the_end_keeps_the_checkpoint_and_says_so(workbench: Workbench, small_disk, monkeypatch) -> None:
    more = ["--outputs", str(small_disk.root), "--trainer.max_steps=1", "--trainer.logger=false"]
    arguments = ["--config", workbench.training("cot_sft"), *more]
    with pytest.raises(SystemExit, match=r"the merged model: .*cannot be written.*free"):
        train.main(arguments)  # two MiB hold the adapter, not the model
    folder = small_disk.root / "tiny" / "cot_sft"
    assert not list(folder.glob("merged*")) and not (folder / "done.json").exists()
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["step-00000001.ckpt"]


def test_a_saved_configuration_of_another_version_is_named(workbench: Workbench) -> None:
    folder = workbench.outputs / "tiny" / "cot_sft"
    settings = yaml.safe_load(Path(workbench.training("cot_sft")).read_text())
    settings["data"]["gone"] = 1
    run_identity.claim(folder, "key")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match=r"config\.yaml was written by another version of the project: .*data\.gone=1"):
        train.main(["--config", str(folder / "config.yaml")])
    del settings["data"]["gone"]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", str(folder / "config.yaml"), "--data.gone=1"])
    message = str(caught.value)
    assert "data.gone=1" in message and "another version" not in message, "the argument is wrong, not the file"
