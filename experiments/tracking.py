"""Weights & Biases without a prompt that waits: online with a key, else offline. One run for each phase folder."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from datamodules.artefacts import write_atomic
from experiments import metrics


def choose_wandb_mode() -> str:
    """Set WANDB_MODE to offline where no key is found, unless the user set it; the mode."""
    if not os.environ.get("WANDB_MODE"):
        os.environ["WANDB_MODE"] = "online" if _has_key() else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    return os.environ["WANDB_MODE"]


def wandb_run_id(folder: Path, key: str) -> str:
    """The W&B id of the run in this phase folder: the same after a resume, another for another run."""
    file = Path(folder) / "wandb_id"
    if not file.is_file() or not file.read_text().startswith(key[:8]):
        write_atomic(file, f"{key[:8]}{secrets.token_hex(4)}")
    return file.read_text().strip()


def wandb_identity(folder: Path, run_id: str) -> dict[str, str]:
    """How the run of outputs/<experiment>/<phase> is found on W&B, again after a resume."""
    phase = Path(folder).resolve()
    names = {"group": phase.parent.name, "job_type": phase.name, "name": f"{phase.parent.name}/{phase.name}"}
    return {"project": "multi-image-grounding", "id": run_id, "resume": "allow"} | names


def log_evaluation(folder: Path, key: str, values: Mapping[str, float]) -> None:
    """Log an evaluation behind the last training step of the W&B run of the phase in `folder`.

    A folder that nothing was trained in, such as the base model's, gets a run of its own, by the evaluation's key. A
    phase that was trained without W&B stays without.
    """
    import wandb

    trained, file = (folder / "config.yaml").is_file(), folder / "wandb_id"
    if trained and not file.is_file():
        return
    choose_wandb_mode()
    identity = wandb_identity(folder, file.read_text().strip() if trained else wandb_run_id(folder, key))
    rows = metrics.read_rows(folder)
    step = int(rows[-1]["step"]) + 1 if rows else 0
    with wandb.init(dir=str(folder), reinit="finish_previous", **identity) as run:
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)  # the axis that WandbLogger uses
        run.log({**values, "trainer/global_step": step})


def finish_run() -> None:
    """End this process's W&B run, if there is one, so that the next has files of its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
