"""Create a sweep on W&B from its YAML, and run it as an agent. Log a local sweep to a W&B run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from datamodules.persistence.files import fingerprint, read_json, write_json
from datamodules.streaming.path_fingerprint import path_fingerprint
from experiments.runs.wandb_runs import PROJECT, choose_wandb_mode, wandb_identity, wandb_run_id, with_given_tags
from experiments.sweeps.plan import SweepPlan


def find_or_create(config: Path, folder: Path) -> str:
    """entity/project/id of the W&B sweep of this YAML: read from <folder>/wandb_sweep.json, or newly created."""
    import wandb

    file, key = folder / "wandb_sweep.json", path_fingerprint(config)
    known = read_json(file)
    if known.get("key") != key:
        settings = yaml.safe_load(config.read_text())
        project = settings.get("project", PROJECT)
        entity = settings.get("entity") or wandb.Api().default_entity
        known = {"key": key, "sweep": f"{entity}/{project}/{wandb.sweep(settings, entity=entity, project=project)}"}
        write_json(file, known)
    print(f"another machine joins with: make agent SWEEP={known['sweep']}", flush=True)
    return known["sweep"]


def run_agent(sweep: str, count: int | None) -> NoReturn:
    """Act as W&B's agent: run the YAML's command for each run that W&B proposes, at most `count` times."""
    # The agent calls `python`, which must be this Python. It stops runs by SIGTERM; they save a checkpoint then.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ |= {"WANDB_JOB_TYPE": "trial", "WANDB_TAGS": ",".join(with_given_tags("sweep"))}
    limit = ["--count", str(count)] if count else []
    os.execv(sys.executable, [sys.executable, "-m", "wandb", "agent", "--forward-signals", *limit, sweep])


def log_sweep(folder: Path, plan: SweepPlan) -> None:
    """One W&B run for a whole local sweep: the table of trials and the best trial. Offline without a key."""
    if choose_wandb_mode() == "disabled":
        return
    import wandb

    summary = read_json(folder / "sweep.json")
    identity = wandb_identity(folder / "sweep", wandb_run_id(folder, fingerprint(folder.name)))
    identity |= {"name": folder.name, "tags": with_given_tags("sweep", plan.method)}
    names = [parameter.name for parameter in plan.varied]
    rows = [
        [t["trial"], t["state"], t["value"], t["seconds"], *(str(t["parameters"][name]) for name in names)]
        for t in summary["trials"]
    ]
    with wandb.init(dir=str(folder), config={"sweep": summary["sweep"]}, **identity) as run:
        table = wandb.Table(columns=["trial", "state", plan.metric, "seconds", *names], data=rows)
        run.log({"sweep/trials": table})
        best = summary["best"] or {}
        run.summary.update({"sweep/best": best.get("value"), "sweep/best_parameters": best.get("parameters")})
        run.summary["sweep/num_trials"] = len(rows)
