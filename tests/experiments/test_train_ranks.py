"""Training runs of several ranks and nodes: they stop, fail, are requeued and go on together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.persistence.files import read_json
from experiments import train
from experiments.runs import metrics_csv
from experiments.runs.command_line import train_phase
from lightning_modules.rl.rollout_log import read_index
from tests.callbacks.test_preemption import put_scontrol
from tests.experiments.conftest import REJECTION, ROOT, Workbench, rolling_back, run_apart


def test_every_rank_of_a_finished_run_ends(workbench: Workbench, monkeypatch, capsys) -> None:
    arguments = ["--config", workbench.training("cot_sft"), "--trainer.logger=false", "--trainer.max_steps=1"]
    train.main(arguments)
    capsys.readouterr()
    monkeypatch.setattr(train_phase, "fit", lambda cli: pytest.fail("a rank went on without the first"))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        train.main(arguments)
        assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_roll_back_together(workbench: Workbench) -> None:
    log = workbench.root / "log.txt"
    more = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=6")
    assert run_apart(rolling_back(workbench), *more, log=log, timeout=400) == 1, log.read_text()
    events = read_json(workbench.outputs / "tiny" / "grpo" / "collapse.json")["events"]
    assert [event["action"] for event in events] == ["roll_back", "stop"], log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_both_ranks_end_where_nothing_is_learnt(workbench: Workbench, strategy: str) -> None:
    config, log = workbench.training("grpo", skip_zero_advantage=True, max_new_tokens=1), workbench.root / "log.txt"
    more = ("--trainer.devices=2", f"--trainer.strategy={strategy}", "--trainer.logger=false")
    more = (*more, "--model.rollout.temperature=1e-6", "--model.update.max_idle_windows=3")
    folder = workbench.outputs / "tiny" / "grpo"
    for number in (3, 4):  # started again, it goes on counting
        assert run_apart(config, *more, log=log, timeout=300) == 1, log.read_text()
        assert f"no group of the last {number} windows" in log.read_text()
        assert [file.name for file in (folder / "checkpoints").iterdir()] == ["step-00000000.ckpt"]
    assert "Traceback" not in log.read_text() and "has ended" not in log.read_text()
    assert not (folder / "done.json").exists() and not (folder / "merged").exists()


@pytest.mark.slow
def test_both_ranks_stop_where_checkpoints_cannot_be_written(workbench: Workbench, small_disk) -> None:
    config, log = workbench.training("grpo"), workbench.root / "log.txt"
    more = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=9", "--trainer.logger=false")
    more = (*more, "--outputs", str(small_disk.root), "--model.lora.rank=64")
    small_disk.fill(but=300_000)
    assert run_apart(config, *more, log=log, timeout=300) == 1
    assert "3 checkpoints in a row could not be written" in log.read_text()


@pytest.mark.slow
def test_under_slurm_a_run_is_requeued_and_goes_on(workbench: Workbench) -> None:
    config, log = workbench.training("grpo"), workbench.root / "log.txt"
    calls = put_scontrol(workbench.root, workbench.outputs / "tiny/grpo/checkpoints")
    job = {"SLURM_JOB_ID": 17, "SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}
    job |= {"SLURM_JOB_NAME": "train", "PATH": f"{workbench.root / 'bin'}:{os.environ['PATH']}"}
    stop = {"STOP_SIGNAL": int(signal.SIGUSR1), "STOP_AT": 10}
    more = ("--trainer.max_steps=6",)
    assert run_apart(config, *more, log=log, **job, **stop) == 143, log.read_text()
    assert calls.read_text() == "requeue 17 interrupted.ckpt step-00000002.ckpt\n"
    assert not list(workbench.outputs.rglob("hpc_ckpt*")), "Lightning's own handler was not called"
    assert run_apart(config, *more, log=log, **job) == 0, log.read_text()
    assert "going on from" in log.read_text()


@pytest.mark.slow
def test_under_slurm_two_ranks_of_lightnings_launcher_requeue_once(workbench: Workbench) -> None:
    config, log = workbench.training("grpo"), workbench.root / "log.txt"
    calls = put_scontrol(workbench.root, workbench.outputs / "tiny/grpo/checkpoints")
    script = workbench.root / "bin/scontrol"
    script.write_text(script.read_text().replace("exit", "sleep 8\nexit"))  # longer than a rank takes to end
    job = {"SLURM_JOB_ID": 17, "SLURM_PROCID": 0, "PATH": f"{workbench.root / 'bin'}:{os.environ['PATH']}"}
    stop = {"STOP_SIGNAL": int(signal.SIGUSR1), "STOP_AT": 6}
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=6")
    code = run_apart(config, *ranks, log=log, timeout=300, **job, **stop)
    assert len(calls.read_text().splitlines()) == 1
    assert "not requeued" not in log.read_text() and "ends too" not in log.read_text()
    assert "SLURM job 17 is requeued" in log.read_text() and code != 0


@pytest.mark.slow
def test_a_rank_killed_in_rejection_sampling_ends_the_other(workbench: Workbench) -> None:
    """Two nodes that were started by hand: no launcher looks after them."""
    sampling = {**REJECTION, "init_args": {"num_samples": 64, "max_new_tokens": 64, "prompts_per_batch": 1}}
    config = workbench.training("grpo", [sampling])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = [sys.executable, "-m", "experiments.train", "--config", config]
    run += ["--trainer.num_nodes=2", "--trainer.strategy=ddp"]
    log, nodes = workbench.root / "log.txt", []
    with log.open("w") as out:
        for rank in range(2):
            environment = variables | {"NODE_RANK": str(rank)}
            nodes.append(subprocess.Popen(run, cwd=ROOT, env=environment, stdout=out, stderr=out))
    journal = workbench.outputs / "tiny/grpo/rejection_sampling/journal-1.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not journal.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        nodes[1].kill()
        assert nodes[0].wait(timeout=60) == 1, log.read_text()
    finally:
        for node in nodes:
            node.kill()
    assert "rank 1" in log.read_text() and "has ended" in log.read_text()


@pytest.mark.slow
def test_sigterm_to_both_ranks_stops_them_behind_the_same_batch(workbench: Workbench) -> None:
    config, log = workbench.training("grpo"), workbench.root / "log.txt"
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=6")
    assert run_apart(config, *ranks, log=log, timeout=300, STOP_SIGNAL=int(signal.SIGTERM), STOP_AT=6) != 0
    checkpoints = workbench.outputs / "tiny" / "grpo" / "checkpoints"
    assert (checkpoints / "interrupted.ckpt").is_file(), log.read_text()
    assert run_apart(config, *ranks, log=log, timeout=300) == 0, log.read_text()
    assert "going on from" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "killed", "signum"),
    [
        ("ddp", 1, signal.SIGKILL),
        ("ddp", 0, signal.SIGKILL),
        ("sharded", 1, signal.SIGKILL),
        ("ddp", 1, signal.SIGSTOP),
        ("ddp", 0, signal.SIGSTOP),
    ],
    ids=["ddp-1", "ddp-0", "sharded-1", "ddp-1-stopped", "ddp-0-stopped"],
)
def test_a_killed_or_stopped_rank_ends_the_run_which_then_goes_on_as_one_left_alone(
    workbench: Workbench, strategy: str, killed: int, signum: signal.Signals
) -> None:
    config = workbench.training("grpo")
    more = (
        "--trainer.devices=2",
        f"--trainer.strategy={strategy}",
        "--trainer.max_steps=4",
        "--model.loss.kl_beta=0.1",
    )

    def outcome(phase: str) -> tuple[list, list]:
        groups = [group.read() for group in read_index(workbench.root / f"{phase}.jsonl")]
        rows = metrics_csv.read_rows(workbench.outputs / "tiny" / phase)
        curves = [metrics_csv.read_curve(rows, name) for name in ("reward/total", "grpo/loss", "grpo/kl")]
        return groups, curves

    for phase in ("whole", "stopped"):
        log = workbench.root / f"{phase}.txt"
        arguments = (*more, f"--phase={phase}", f"--model.rollout.log={workbench.root / phase}.jsonl")
        if phase == "stopped":
            # Four rewards a batch and rank: in the middle of the second.
            stop = {"STOP_SIGNAL": int(signum), "STOP_AT": 6, "STOP_RANK": killed}
            assert run_apart(config, *arguments, log=log, timeout=900, **stop) != 0, log.read_text()
            killed_at = float((workbench.root / "killed_at").read_text())
            while left_behind(workbench.root):  # rank 0 may be gone before the others have noticed
                assert time.time() - killed_at < 60, left_behind(workbench.root)
                time.sleep(0.5)
            assert re.search(f"rank:? {killed}", log.read_text()), "RankWatch or Lightning's launcher, who is first"
        assert run_apart(config, *arguments, log=log, timeout=900) == 0, log.read_text()
    assert "going on from" in log.read_text()
    assert outcome("whole") == outcome("stopped") and outcome("whole")[0]


def left_behind(root: Path) -> list[Path]:
    """Processes with this folder in their command line."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(root).encode() in read_bytes(path)]


def read_bytes(path: Path) -> bytes:
    """Empty for what is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_nodes_started_by_torchrun(workbench: Workbench, strategy: str) -> None:
    """On this machine, each node a torchrun of its own; they meet at a port."""
    config = workbench.training("cot_sft")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    run = ["-m", "experiments.train", "--config", config, "--trainer.num_nodes=2", f"--trainer.strategy={strategy}"]
    logs = [workbench.root / f"node{node}.txt" for node in range(2)]
    nodes = []
    for log in logs:
        with log.open("w") as out:
            nodes.append(subprocess.Popen([*launch, *run], cwd=ROOT, env=variables, stdout=out, stderr=out))
    try:
        codes = [node.wait(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0, 0], "".join(log.read_text() for log in logs)
    folder = workbench.outputs / "tiny" / "cot_sft"
    assert (folder / "merged" / "model.safetensors").is_file()
    assert [step for step, _ in metrics_csv.read_curve(metrics_csv.read_rows(folder), "train/loss")] == [0, 1]


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "fsdp"])
def test_strategies_that_cannot_work_are_refused_before_weights_are_read(workbench: Workbench, strategy: str) -> None:
    config = workbench.training("cot_sft")
    with pytest.raises(SystemExit, match=f"trainer.strategy='{strategy}'.*sharded"):
        train.main(["--config", config, f"--trainer.strategy={strategy}"])
