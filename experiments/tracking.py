"""Weights & Biases without a prompt that waits: online with a key, else offline."""

from __future__ import annotations

import netrc
import os
import secrets
from pathlib import Path

from datamodules.artefacts import write_atomic


def choose_wandb_mode() -> str:
    """Set WANDB_MODE to offline where no key is found, unless the user set it; the mode."""
    if not os.environ.get("WANDB_MODE"):
        os.environ["WANDB_MODE"] = "online" if _has_key() else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    return os.environ["WANDB_MODE"]


def wandb_run_id(folder: Path, key: str) -> str:
    """The W&B id of the run in this phase folder: the same after a resume, another for another run."""
    file = Path(folder) / "wandb_id"
    if not file.is_file():
        write_atomic(file, f"{key[:8]}{secrets.token_hex(4)}")
    return file.read_text().strip()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
