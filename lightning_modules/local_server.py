"""A model of one's own behind `transformers serve` on this machine, for as long as somebody needs it.

The server is a process of its own, which ends with the one that started it:
`python -m lightning_modules.local_server <that one's id> <arguments of transformers serve>`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datamodules.artefacts import read_json, write_json
from datamodules.processes import ChildWatch, end_with_parent

HOST = "127.0.0.1"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class LocalServer:
    """A running server: its address, and the name by which it knows its model."""

    base_url: str
    model: str


@contextmanager
def local_server(model: str, work: Path, device: str = "auto", startup_seconds: float = 600.0) -> Iterator[LocalServer]:
    """Serve `model`, a folder or Hub name, until the context is left. `work` gets server.log and the served folder.

    Raises RuntimeError with the end of the log when the server does not come up.
    """
    work.mkdir(parents=True, exist_ok=True)
    served = str(sampling_folder(Path(model), work / "model")) if Path(model).is_dir() else model
    port = _free_port()
    command = [sys.executable, "-m", "lightning_modules.local_server", str(os.getpid()), served]
    command += ["--host", HOST, "--port", str(port), "--device", device]
    log = work / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        # One that is stopped would take each request and let it wait for its timeout.
        with ChildWatch(lambda: [process.pid]):
            _wait_until_healthy(process, f"http://{HOST}:{port}/health", log, startup_seconds)
            yield LocalServer(f"http://{HOST}:{port}/v1", served)
    finally:
        process.kill()
        process.wait()


def sampling_folder(model: Path, folder: Path) -> Path:
    """A copy of a model folder, by links, whose generation settings sample.

    `transformers serve` takes a temperature from the request, but whether to sample at all from the model alone.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(model.resolve().iterdir()):
        if file.is_file() and file.name != GENERATION:
            (folder / file.name).symlink_to(file)
    write_json(folder / GENERATION, read_json(model / GENERATION) | {"do_sample": True})
    return folder.resolve()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):  # not listening yet
            time.sleep(0.2)
    state = f"ended with {process.returncode}" if process.poll() is not None else f"is not up after {seconds:.0f} s"
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the local server {state}; it needs `transformers[serving]`. The end of {log}:\n{tail}")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    from transformers.cli.transformers import app

    app(["serve", *sys.argv[2:]])
