"""A model of one's own behind `transformers serve` on this machine, for as long as somebody needs it.

The server is a process of its own, which ends with the one that started it:
`python -m lightning_modules.serving.transformers_server <that one's id> <arguments of transformers serve>`.
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
from typing import Any

from datamodules.checkpoints.model_folder import CONFIG, check_image_text_model, local_folder
from datamodules.checkpoints.pretrained import ANY_ATTENTION, check_tensors, check_values
from datamodules.persistence.files import read_json, write_json
from datamodules.persistence.processes import ChildWatch, end_with_parent
from lightning_modules.serving.generation_rules import NEUTRAL, TOKEN_IDS

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

    Raises ModelError for a model that lacks weights or has some that are not finite: the server itself would fill gaps
    with random numbers. Raises RuntimeError with the end of the log when the server does not come up.
    """
    check_image_text_model(model)
    check_tensors(model, ANY_ATTENTION)
    check_values(model)
    work.mkdir(parents=True, exist_ok=True)
    served = str(sampling_folder(local_folder(model), work / "model"))
    port = _free_port()
    command = [sys.executable, "-m", "lightning_modules.serving.transformers_server", str(os.getpid()), served]
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
    """A copy of a model folder, by links, whose generation settings sample, by the request's temperature alone, and
    whose configuration names no attention.

    `transformers serve` takes temperature and top_p from the request, but whether to sample at all, and all other
    samplers, from the model alone. An attention implementation that a configuration names may be code on the Hub.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(model.resolve().iterdir()):
        if file.is_file() and file.name not in (GENERATION, CONFIG):
            (folder / file.name).symlink_to(file)
    own = read_json(model / GENERATION)
    ids = {name: own[name] for name in ("eos_token_id", *TOKEN_IDS) if own.get(name) is not None}
    # top_k 0 is off; where it is missing, transformers takes 50.
    write_json(folder / GENERATION, NEUTRAL | ids | {"do_sample": True, "top_k": 0, "top_p": 1.0})
    write_json(folder / CONFIG, _without_attention(read_json(model / CONFIG)))
    return folder.resolve()


def _without_attention(config: Any) -> Any:
    """A configuration, nested as it may be, without the names of attention implementations."""
    if not isinstance(config, dict):
        return config
    named = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    return {key: _without_attention(value) for key, value in config.items() if key not in named}


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
