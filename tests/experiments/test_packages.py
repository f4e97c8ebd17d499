"""webdataset is the way of the data and torchmetrics that of the numbers: no main command works without them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
import yaml

from datamodules.persistence.source_code import class_modules, source_code
from tests.experiments.conftest import ROOT, Workbench

NANO = ROOT / "experiments/configs/nano"
PACKAGES = ("webdataset", "torchmetrics")
# Without the package, and only for the project's own files: Lightning imports torchmetrics too.
WITHOUT = """
import builtins, sys
package, module, *arguments = sys.argv[1:]
original = builtins.__import__

def without(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if name.split(".")[0] == package and importer in ("datamodules", "lightning_modules", "callbacks", "experiments"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = without
sys.argv = [module]
import importlib
importlib.import_module(module).main(arguments)
"""


def users(package: str, modules: list[str]) -> list[str]:
    """The project's files that import the package, among those that these modules import at once or late."""
    found = []
    for name in source_code(modules):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(each.split(".")[0] == package for each in names):
                found.append(name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("command", ["sft", "grpo", "eval"])
def test_the_main_commands_use_it_in_files_of_the_project(command: str, package: str) -> None:
    if command == "eval":
        modules = ["experiments.evaluate"]
    else:
        name = {"sft": "cot_sft", "grpo": "grpo"}[command]
        settings = yaml.safe_load((NANO / f"{name}.yaml").read_text())
        modules = ["experiments.train", *class_modules(settings)]
    assert users(package, modules), f"make {command} does without {package}"


@pytest.mark.slow
@pytest.mark.parametrize("package", [*PACKAGES, "none"])
@pytest.mark.parametrize("command", ["sft", "grpo", "eval"])
def test_without_it_a_main_command_fails(workbench: Workbench, command: str, package: str) -> None:
    if command == "eval":
        where = [f"--bench={workbench.root / 'shards'}", f"--output={workbench.outputs / 'eval'}"]
        arguments = [
            f"--model={workbench.model}",
            f"--data_root={workbench.root}",
            *where,
            "--decoding.max_new_tokens=4",
            "--limit=2",
        ]
        arguments = ["experiments.evaluate", *arguments]
    else:
        phase = {"sft": "cot_sft", "grpo": "grpo"}[command]
        arguments = ["experiments.train", "--config", workbench.training(phase), "--trainer.logger=false"]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if package == "none":
        assert ended.returncode == 0, ended.stderr[-2000:]
    else:
        words = (f"No module named '{package}", f"needs the package {package}")
        assert ended.returncode != 0 and any(each in ended.stderr for each in words), ended.stderr[-2000:]


def test_no_file_of_the_project_writes_tars_by_hand() -> None:
    folders = ("datamodules", "lightning_modules", "callbacks", "experiments")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in files if "TarInfo(" in (text := path.read_text()) or ".addfile(" in text] == []
