"""What setup.cfg asks of the package index."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

CONFIG = Path(__file__).resolve().parents[1] / "setup.cfg"


def requirements() -> list[Requirement]:
    """Of the project and of all its extras, but for the project itself."""
    parser = configparser.ConfigParser()
    parser.read(CONFIG)
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line for text in lists for line in text.splitlines() if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != parser["metadata"]["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_bounded_below_and_above(requirement: Requirement) -> None:
    operators = {part.operator for part in requirement.specifier}
    assert ">=" in operators and "<" in operators


def test_lightning_has_its_fixes_of_code_execution_in_loading() -> None:
    (lightning,) = [requirement for requirement in requirements() if requirement.name == "lightning"]
    assert Version("2.6.6") in lightning.specifier
    assert Version("2.6.5") not in lightning.specifier
