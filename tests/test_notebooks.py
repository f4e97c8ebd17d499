"""The notebooks run from the first cell to the last, and are stored without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tutorials import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 3600  # the machine may be busy


def test_there_are_notebooks_and_they_hold_no_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install -e '.[dev]'")
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_ladder_is_climbed_and_the_trained_model_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install -e '.[dev]'")
    nbformat = pytest.importorskip("nbformat")
    # The kernel is a process of its own: it imports the project from here, in every folder.
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    book = nbformat.read(ROOT / "notebooks/nano_ladder.ipynb", as_version=4)
    (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    settings.source += f"\noutputs = Path({str(tmp_path)!r})\n"
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(book, timeout=CELL_SECONDS, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs)
    for words in ("base     accuracy", "cot_sft  accuracy", "grpo     accuracy", "best: reward", "answer: "):
        assert words in said, said[-2000:]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the drawing"
