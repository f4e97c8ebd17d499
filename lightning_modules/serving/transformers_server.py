"""Serve a model with `transformers serve` on this machine, while a context manager is open.

The server is a separate process, and ends together with the process that started it:
`python -m lightning_modules.serving.transformers_server <id of that process> <arguments of transformers serve>`.
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
STARTUP_SECONDS = 600.0  # in which the server must be ready


@dataclass(frozen=True)
class LocalServer:
    """A running server."""

    base_url: str
    model: str  # the name that requests must give


@contextmanager
def local_server(model: str, work: Path, device: str = "auto") -> Iterator[LocalServer]:
    """Serve a model inside the context.

    Args:
        model: folder or Hub name.
        work: folder for server.log and for the copy of the model folder that is served.
        device: name of the device for `transformers serve`.

    Raises:
        ModelError: weights of the model are missing or not finite.
        RuntimeError: the server did not start; the message has the end of its log.
    """
    # 1. Check the weights here: the server would fill missing ones with random numbers.
    check_image_text_model(model)
    check_tensors(model, ANY_ATTENTION)
    check_values(model)
    # 2. Start the server in a separate process.
    work.mkdir(parents=True, exist_ok=True)
    served = str(sampling_folder(local_folder(model), work / "model"))
    port = _free_port()
    command = [sys.executable, "-m", "lightning_modules.serving.transformers_server", str(os.getpid()), served]
    command += ["--host", HOST, "--port", str(port), "--device", device]
    log = work / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    # 3. Wait until it is ready, yield it, and kill it at the end.
    try:
        # A stopped server (SIGSTOP) would accept requests and never answer, so ChildWatch kills it.
        with ChildWatch(lambda: [process.pid]):
            _wait_until_healthy(process, f"http://{HOST}:{port}/health", log, STARTUP_SECONDS)
            yield LocalServer(f"http://{HOST}:{port}/v1", served)
    finally:
        process.kill()
        process.wait()


def sampling_folder(model: Path, folder: Path) -> Path:
    """Make a copy of a model folder that samples with the temperature of the request; returns its path.

    All files are symbolic links, except two:

    - generation_config.json enables sampling and sets all sampling parameters to neutral values. `transformers serve`
      takes temperature and top_p from the request, but takes everything else, including whether to sample, only from
      this file.
    - config.json names no attention implementation, because such a name may refer to code on the Hub.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Everything else as links.
    for file in sorted(model.resolve().iterdir()):
        if file.is_file() and file.name not in (GENERATION, CONFIG):
            (folder / file.name).symlink_to(file)
    own = read_json(model / GENERATION)
    ids = {name: own[name] for name in ("eos_token_id", *TOKEN_IDS) if own.get(name) is not None}
    # top_k 0 means off; without this field, transformers uses 50.
    write_json(folder / GENERATION, NEUTRAL | ids | {"do_sample": True, "top_k": 0, "top_p": 1.0})
    write_json(folder / CONFIG, _without_attention(read_json(model / CONFIG)))
    return folder.resolve()


def _without_attention(config: Any) -> Any:
    """A configuration, at all its levels, without the names of attention implementations."""
    if not isinstance(config, dict):
        return config
    named = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    return {key: _without_attention(value) for key, value in config.items() if key not in named}


def _free_port() -> int:
    """A port that no process uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))  # port 0 lets the system choose
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path, seconds: float) -> None:
    """Wait until the server answers; raise RuntimeError if it ends, or after `seconds`."""
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
