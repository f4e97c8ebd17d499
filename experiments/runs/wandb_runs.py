"""Weights & Biases: online with a key, otherwise offline, never an interactive prompt. One run per phase folder."""

from __future__ import annotations

import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.preemption import is_first_process
from datamodules.metrics.drawing import preview_table
from datamodules.persistence.files import fingerprint, read_json, write_atomic, write_json
from datamodules.persistence.user_error import SettingsError
from experiments.runs import metrics_csv, run_identity
from experiments.runs.results import current_commit

PROJECT = "multi-image-grounding"
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # the values that W&B accepts


def choose_wandb_mode() -> str:
    """Set WANDB_MODE to offline if there is no key, unless the user has set it. Returns the mode.

    WANDB_DISABLED, which other programs know, is the same as WANDB_MODE=disabled: nothing is logged to W&B. Raises
    SettingsError for a mode that W&B does not have.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() not in ("", "0", "false", "no", "off"):
        os.environ["WANDB_MODE"] = "disabled"
    if not os.environ.get("WANDB_MODE"):
        os.environ["WANDB_MODE"] = "online" if has_key() else "offline"
    if os.environ["WANDB_MODE"] not in MODES:
        raise SettingsError(f"WANDB_MODE={os.environ['WANDB_MODE']!r} must be online, offline or disabled")
    os.environ.setdefault("WANDB_SILENT", "true")
    return os.environ["WANDB_MODE"]


def wandb_run_id(folder: Path, key: str) -> str:
    """The W&B id of the run in this phase folder. It stays the same after a resume.

    Only the first process logs to W&B and writes the id. Ranks that torchrun or SLURM starts together could otherwise
    replace it by another one, under which a resumed run would go on as a second run.
    """
    file = Path(folder) / "wandb_id"
    if not is_first_process():
        return key[:8]
    if os.environ.get("WANDB_SWEEP_ID"):  # W&B's agent has named the run and accepts no other name
        write_atomic(file, os.environ["WANDB_RUN_ID"])
    elif not file.is_file() or not file.read_text().startswith(key[:8]):
        write_atomic(file, f"{key[:8]}{secrets.token_hex(4)}")
    return file.read_text().strip()


def wandb_identity(folder: Path, run_id: str) -> dict[str, Any]:
    """Arguments of `wandb.init` for the run of outputs/<experiment>/<phase>, the same after a resume.

    Its group is WANDB_RUN_GROUP, or else the experiment. Its tags are those of WANDB_TAGS, the experiment without its
    seed, the seed, if the name has one, and the phase.
    """
    phase = Path(folder).resolve()
    experiment = phase.parent.name
    group = os.environ.get("WANDB_RUN_GROUP") or experiment
    kind = os.environ.get("WANDB_JOB_TYPE") or phase.name  # a sweep marks its phases as trials
    names = {"group": group, "job_type": kind, "name": f"{experiment}/{phase.name}"}
    tags = with_given_tags(*re.split(r"-(?=seed\d+$)", experiment), phase.name)
    names["tags"] = [tag[:64] for tag in tags]  # W&B refuses longer tags
    return {"project": PROJECT, "id": run_id, "resume": "allow"} | names


def wandb_environment(group: str, *tags: str) -> dict[str, str]:
    """The variables that give the W&B run of a process a group, and tags beside the tags that the user has set."""
    return {"WANDB_RUN_GROUP": group, "WANDB_TAGS": ",".join(with_given_tags(*tags))}


def child_environment() -> dict[str, str]:
    """This process's variables for a child process, without its W&B service.

    The service would hold the run of a child that has ended or was killed, and refuse that run to the next child.
    """
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def with_given_tags(*tags: str) -> list[str]:
    """The tags that the user has set in WANDB_TAGS, then `tags`, each once."""
    given = os.environ.get("WANDB_TAGS", "").split(",")
    return [tag for tag in dict.fromkeys([*given, *tags]) if tag]


def log_evaluation(
    folder: Path,
    key: str,
    values: Mapping[str, float],
    settings: Mapping[str, Any],
    previews: Sequence[Sequence[Any]] = (),
    after: Callable[[Any], None] = lambda run: None,
) -> None:
    """Log an evaluation to the W&B run of the phase in `folder`, after its last training step.

    `settings` go into the run's config as "evaluation", with the commit; `previews` are rows of `preview_table`. A
    folder without training, such as that of the base model, gets its own run, identified by the key of the evaluation.
    A phase that was trained without W&B gets no run. Returns at once if W&B is switched off. `after` is called with the
    open run.
    """
    if choose_wandb_mode() == "disabled":
        return
    import wandb

    trained, file = (folder / run_identity.CONFIG).is_file(), folder / "wandb_id"
    if trained and not file.is_file():
        return
    identity = wandb_identity(folder, file.read_text().strip() if trained else wandb_run_id(folder, key))
    rows = metrics_csv.read_rows(folder)
    step = int(rows[-1]["step"]) + 1 if rows else 0
    with wandb.init(dir=str(folder), reinit="finish_previous", **identity) as run:
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)  # the axis that WandbLogger uses
        facts = {"commit": current_commit(Path(__file__).parent)}
        run.config.update({"evaluation": dict(settings) | facts}, allow_val_change=True)
        if previews:
            values = {**values, "previews": preview_table(previews)}
        run.log({**values, "trainer/global_step": step})
        after(run)


def finish_run() -> None:
    """End this process's W&B run, if there is one, so that the next run has its own files."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def log_summary(folder: Path, values: Mapping[str, float], tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Log figures and tables of a whole experiment to one W&B run. Nothing is logged twice in a row.

    Args:
        folder: outputs/<experiment>/<name>; it gives the name of the run.
        values: name -> number.
        tables: title -> rows of text cells, header first.
    """
    if choose_wandb_mode() == "disabled":
        return
    import wandb

    key, marker = fingerprint(values, tables), folder / "logged.json"
    if read_json(marker).get("key") == key:
        return
    identity = wandb_identity(folder, wandb_run_id(folder, fingerprint(folder.parent.name)))
    with wandb.init(dir=str(folder), reinit="finish_previous", **identity) as run:
        shown = {name: wandb.Table(columns=list(rows[0]), data=list(rows[1:])) for name, rows in tables.items()}
        run.log({**values, **shown})
    write_json(marker, {"key": key})


def has_key() -> bool:
    """Whether there is a key of the W&B server in the environment or in .netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
