"""What makes a phase restartable: markers with the hash of what it depends on, and a lock on its folder."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from datamodules.artefacts import read_json, write_json
from datamodules.boxes import Convention
from datamodules.prompts import PromptStyle

DONE = "done.json"
STARTED = "started.json"
CONFIG = "config.yaml"


class OtherVersion(ValueError):
    """A phase's saved settings are not those of this version of the project; the message names file and field."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"{Path(folder) / CONFIG} was written by another version of the project: {what}")


def read_marker(folder: Path, name: str = DONE) -> dict:
    """The marker's content; {} without one."""
    return read_json(Path(folder) / name)


def write_marker(folder: Path, name: str = DONE, **content: object) -> None:
    write_json(Path(folder) / name, content)


def claim(folder: Path, key: str, say: Callable[[str], None] = print, **facts: object) -> bool:
    """Prepare a phase folder for the run with the hash `key`; True when that run is already done.

    `facts` of the run that begins, such as the commit, are written down beside its hash.

    A folder that holds a run with another hash is moved aside whole: nothing computed is lost, nothing old is reused.
    """
    folder = Path(folder)
    if read_marker(folder).get("key") == key:
        return True
    started = read_marker(folder, STARTED).get("key")
    if started is not None and started != key:
        say(f"{folder} holds a run with other settings or inputs: moved to {set_aside(folder)}")
    write_marker(folder, STARTED, key=key, **facts)
    return False


def trained_commit(folder: Path) -> str | None:
    """The commit of the last attempt at the run in this phase folder; None where there was none."""
    return read_marker(folder, STARTED).get("commit")


def set_aside(folder: Path) -> Path:
    """Rename the phase folder out of the way; its new place."""
    aside = folder.with_name(f"{folder.name}.{read_marker(folder, STARTED).get('key', 'old')[:8]}")
    while aside.exists():
        aside = aside.with_name(aside.name + "+")
    folder.rename(aside)
    return aside


def wait_for_claim(folder: Path, key: str, seconds: float = 600.0) -> bool:
    """On the other ranks: wait until the leader has claimed the folder for this run; True when it is already done.

    The leader ends then, so a rank that went on would wait for it in vain.
    """
    end = time.monotonic() + seconds
    while read_marker(folder, STARTED).get("key") != key:
        if time.monotonic() > end:
            raise TimeoutError(f"{folder}: the first rank did not claim it for run {key} within {seconds:.0f} s")
        time.sleep(0.2)
    return read_marker(folder).get("key") == key


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the phase in this folder was trained with; {} where there are none. May raise OtherVersion."""
    file = Path(folder) / CONFIG
    settings = yaml.safe_load(file.read_text()) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise OtherVersion(folder, f"no settings by name, but {settings!r:.40}")
    return settings


def read_field(folder: Path, name: str) -> Any:
    """The saved setting of this dotted name. Raises OtherVersion where it is not there."""
    value: Any = read_settings(folder)
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise OtherVersion(folder, f"it has no field {name}")
        value = value[part]
    return value


def trained_form(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `given` as the phase that the merged model lies in had them, saying which differ.

    {} for a model that no phase left. One YAML so evaluates the base model, answer-only SFT and models that think.
    """
    phase, config = Path(model).parent, Path(model).parent / CONFIG
    if Path(model).name != "merged" or not config.is_file():
        return {}
    trained = {name: read_field(phase, f"data.{name}") for name in given}
    for name, kind in (("convention", Convention), ("style", PromptStyle)):
        if name in trained and trained[name] not in list(kind):
            raise OtherVersion(phase, f"data.{name}={trained[name]!r} is none of {[str(k.value) for k in kind]}")
    for name, value in trained.items():
        if value != given[name]:
            print(f"{name}={value} as {config} has it, not {given[name]}; --as_trained=false puts questions as given")
    return trained


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print, wait: bool = True) -> Iterator[bool]:
    """Hold the folder's lock; while another process holds it, wait, saying so. The system frees it on any exit.

    Without `wait` it is not waited for. Yields whether the lock is held. Ends the program where nothing can be written
    beside the folder.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        sys.exit(f"{folder} cannot be written: {error}")
    with lock as file:
        held = waited = False
        while not held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if not wait:
                    break
                if not waited:
                    say(f"waiting: another process is working in {folder}")
                waited = True
                time.sleep(1.0)
        yield held
