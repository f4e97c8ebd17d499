"""Make phases restartable: markers with a hash of all dependencies, and the saved settings of a phase."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from datamodules.persistence.files import read_json, write_json
from datamodules.persistence.user_error import UserError
from experiments.runs.changes import (
    Choice,
    Differences,
    MadeOf,
    OtherRun,
    decide,
    find_differences,
    is_stale,
    kept,
    origin,
    other_run_text,
    question,
    set_aside_text,
)

DONE = "done.json"
STARTED = "started.json"
CONFIG = "config.yaml"


class OtherVersion(UserError, ValueError):
    """The saved settings of a phase come from another version of the project. The message names file and field."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"{Path(folder) / CONFIG} was written by another version of the project: {what}")


def read_marker(folder: Path, name: str = DONE) -> dict:
    """The content of a marker; {} without a marker."""
    return read_json(Path(folder) / name)


def write_marker(folder: Path, name: str = DONE, **content: object) -> None:
    write_json(Path(folder) / name, content)


def claim(
    folder: Path,
    run: MadeOf | str,
    say: Callable[[str], None] = print,
    choice: Choice | None = None,
    cure: str = "",
    **facts: object,
) -> bool:
    """Prepare a phase folder for a run. Returns True if this run is already done.

    A folder with a run of other settings or inputs is renamed, and the differences are printed. With a `cure` it is
    renamed only with the choice "redo", or if only the content of inputs at the same path differs, because the user has
    made these inputs again. No result is lost, and no old result is reused.

    Args:
        folder: the phase folder.
        run: settings, inputs and code of the run, or only its hash. They are written to started.json.
        say: prints a message.
        choice: the user's choice if only the code may differ. "keep" uses or continues the existing run; "redo" renames
            its folder.
        cure: how the user keeps both runs if the settings differ; "": the old folder is renamed without a question.
        facts: more fields of started.json, such as the commit.

    Raises CodeChanged if only the code may differ and there is no `choice`, and OtherRun if the settings differ and
    there is a `cure`.
    """
    folder = Path(folder)
    run = MadeOf(run) if isinstance(run, str) else run
    found = _look(folder, run, choice, cure)
    started, done = found.started, found.done
    # 1. Rename the folder of another run, or of a run with other code that is repeated.
    if found.decision == "redo":
        say(f"{folder} is made again: what it holds moved to {set_aside(folder)}")
        started = done = {}
    elif found.is_other:
        aside = set_aside(folder)
        say(f"{set_aside_text(folder, aside, found.differences)}\nmoved to {aside}")
        started = done = {}
    # 2. Mark a run with other code that is kept.
    elif found.decision == "keep":
        started = started | kept(started, run.code)
        if done:
            write_marker(folder, **(done | {"key": run.key} | kept(started, run.code)))
        say(f"{folder} is kept, although other source files have made it")
    # 3. Record the settings, inputs and code of the run.
    if not done or found.decision == "keep":
        recorded = {*run.record(), "kept"}
        kept_facts = {name: value for name, value in started.items() if name not in recorded}
        write_marker(folder, STARTED, **(run.record() | origin(started) | (kept_facts if done else facts)))
    return bool(done)


def is_recorded(folder: Path) -> bool:
    """Whether the folder says which run it holds. Then `claim` leaves nothing of another run there: what it finds is
    this run's, also if the key is another one, because the user keeps the run of another version of the project."""
    return "key" in read_marker(folder, STARTED)


def check(folder: Path, run: MadeOf, choice: Choice | None, cure: str) -> None:
    """Raise what `claim` would raise with these arguments; the folder stays as it is."""
    _look(Path(folder), run, choice, cure)


def finish(folder: Path, key: str, **facts: object) -> None:
    """Mark the claimed run with this hash as done, with the code with which it began."""
    write_marker(folder, key=key, **facts, **origin(read_marker(folder, STARTED)))


@dataclass(frozen=True)
class _Found:
    """The state of a phase folder from the view of a run that wants to use it."""

    started: dict[str, Any]  # started.json
    done: dict[str, Any]  # done.json
    is_other: bool = False  # the folder has a run with other settings or inputs
    decision: Choice | None = None  # the folder may have this run, but made with other code
    differences: Differences = field(default_factory=lambda: Differences([], [], []))


def _look(folder: Path, run: MadeOf, choice: Choice | None, cure: str = "") -> _Found:
    """Read the state of a folder. Raises CodeChanged if only the code may differ and there is no choice; OtherRun as
    `claim` does."""
    started, done = read_marker(folder, STARTED), read_marker(folder)
    # 1. Equal keys: only the code may differ.
    known, differences, is_other = started.get("key", done.get("key")), Differences([], [], []), False
    is_other_code = known == run.key and is_stale(started, run.code, choice)
    # 2. Different keys: compare the settings, to distinguish a real change from a field that a version has added.
    if known not in (None, run.key):
        record = _recorded(folder, run, started)
        differences = find_differences(record, run) if record else differences
        # A setting that only one of the two runs has was added or removed by a version of the project, so its value in
        # the other run is unknown. In this case, too, only the code may differ. If the code is the same, this can only
        # be a setting of Lightning; all others come from the user.
        may_be_same = record is not None and not differences.values and bool(run.code)
        is_same_code = not is_stale(started, run.code)
        may_be_same &= not is_same_code or all(name.startswith("trainer.") for name in differences.fields)
        is_other_code = may_be_same and ("settings" not in started or bool(differences.fields))
        is_other = not is_other_code
        is_remade = bool(differences.values) and differences.values == differences.contents
        if is_other and cure and choice != "redo" and not is_remade:
            raise OtherRun(other_run_text(folder, bool(done), differences, cure))
    message = partial(question, str(folder), bool(done), started, run.code, differences.fields)
    return _Found(started, done, is_other, decide(is_other_code, choice, message), differences)


def _recorded(folder: Path, run: MadeOf, started: dict) -> dict | None:
    """Settings and inputs of the existing run, from its own record or from its config.yaml; None if unknown."""
    if "settings" in started:
        return started
    try:
        settings, inputs = run.saved(read_settings(folder)) if run.saved else ({}, {})
    except (OtherVersion, yaml.YAMLError, KeyError, TypeError, AttributeError):  # another version with another format
        return None
    return {"settings": settings, "inputs": inputs} if settings else None


def trained_commit(folder: Path) -> str | None:
    """The commit of the last attempt in this phase folder; None if there was no attempt."""
    return read_marker(folder, STARTED).get("commit")


def set_aside(folder: Path) -> Path:
    """Rename the phase folder; returns its new path."""
    # The key in the name distinguishes runs; a second copy of the same run gets a "+".
    aside = folder.with_name(f"{folder.name}.{read_marker(folder, STARTED).get('key', 'old')[:8]}")
    while aside.exists():
        aside = aside.with_name(aside.name + "+")
    folder.rename(aside)
    return aside


def is_aside(folder: Path) -> bool:
    """Whether `set_aside` has given the folder its name, and not a user, as in `nano.20261130` or `nano.old`."""
    found = re.search(r".\.([0-9a-f]{8}|old)\+*$", folder.name)
    if found is None:
        return False
    key = read_marker(folder, STARTED).get("key")
    return (folder / CONFIG).is_file() if key is None and found[1] == "old" else (key or "")[:8] == found[1]


def wait_for_claim(
    folder: Path, run: MadeOf | str, seconds: float = 600.0, choice: Choice | None = None, cure: str = ""
) -> bool:
    """On the other ranks: wait until the leader has claimed the folder for this run.

    Returns True if it is already done.

    The leader ends if the run is done, or if it must ask about changed code. Every other rank must then end too.

    Args:
        folder: the phase folder.
        run: the same as in the leader's call of `claim`.
        seconds: the longest wait.
        choice: the same as in the leader's call of `claim`.
        cure: the same as in the leader's call of `claim`.

    Raises CodeChanged and OtherRun as `claim` does, and TimeoutError after `seconds`.
    """
    run = MadeOf(run) if isinstance(run, str) else run
    end = time.monotonic() + seconds
    while True:
        found = _look(Path(folder), run, choice, cure)
        # Polling a file needs no process group.
        if found.started.get("key") == run.key and found.decision is None:
            return found.done.get("key") == run.key
        if time.monotonic() > end:
            raise TimeoutError(f"{folder}: the first rank did not claim it for run {run.key} within {seconds:.0f} s")
        time.sleep(0.2)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings with which the phase in this folder was trained; {} if there are none. May raise OtherVersion."""
    file = Path(folder) / CONFIG
    settings = yaml.safe_load(file.read_text()) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise OtherVersion(folder, f"no settings by name, but {settings!r:.40}")
    return settings


def read_field(folder: Path, name: str) -> Any:
    """The saved setting with this dotted name. Raises OtherVersion if it does not exist."""
    value: Any = read_settings(folder)
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise OtherVersion(folder, f"it has no field {name}")
        value = value[part]
    return value


def callback_entries(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The callbacks of a configuration, each as {"class_path": …, "init_args": …}.

    As the training command accepts them, a single one may stand without a list, and a class path for an entry.
    """
    given = (settings.get("trainer") or {}).get("callbacks") or []
    entries = given if isinstance(given, list) else [given]
    return [entry if isinstance(entry, dict) else {"class_path": str(entry)} for entry in entries]
