"""The recipes in CONTRIBUTING.md name functions, classes and settings that the code has."""

from __future__ import annotations

import re
from pathlib import Path

from tests.documents import Page, read_page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("datamodules", "lightning_modules", "callbacks", "experiments", "tests")
NAME = re.compile(r"[A-Za-z_]\w*")
MEMBER = re.compile(r"([A-Z]\w*)\.(\w+)")
PLACE = re.compile(r"`([A-Za-z_]\w*)` (?:in |\()`([\w/]+\.py)`")  # `name` in `file.py`, `name` (`file.py`)


def unknown_names(page: Page) -> list[str]:
    """Names in the page's inline code that no file has; a member must stand in a file that defines its class."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path != Path(__file__)]
    texts = [path.read_text(encoding="utf-8") for path in files]
    words = {word for text in texts for word in NAME.findall(text)}
    unknown = []
    for code in page.code:
        if code.language is not None:
            continue
        if NAME.fullmatch(code.text) and code.text not in words:
            unknown.append(code.text)
        elif (found := MEMBER.fullmatch(code.text)) and found[2] not in ("md", "yaml", "cff"):
            owners = [text for text in texts if re.search(rf"^class {found[1]}\b", text, re.MULTILINE)]
            if not any(re.search(rf"\b{found[2]}\b", text) for text in owners):
                unknown.append(code.text)
    return unknown


def test_names_in_the_recipes_exist(tmp_path: Path) -> None:
    assert unknown_names(read_page(ROOT / "CONTRIBUTING.md")) == []
    page = tmp_path / "page.md"
    page.write_text("`GRPO.problems` and `smart_resize` exist; `GRPO.no_member` and `_no_function_has_this` do not.\n")
    assert unknown_names(read_page(page)) == ["GRPO.no_member", "_no_function_has_this"]


def misplaced_names(text: str) -> list[str]:
    """Names that the file named beside them does not have."""
    places = PLACE.findall(" ".join(text.split()))
    return [name for name, file in places if not re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))]


def test_names_in_the_recipes_are_in_the_files_beside_them() -> None:
    recipes = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(PLACE.findall(" ".join(recipes.split()))) > 10
    assert misplaced_names(recipes) == []
    assert misplaced_names("`LABEL` in\n`experiments/synthesize.py`, `GRPO` (`lightning_modules/grpo.py`)") == ["LABEL"]
