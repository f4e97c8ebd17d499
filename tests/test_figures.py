"""The figures of the pages are those that their scripts draw, and small; the citation is that of this version."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

import yaml

from datamodules.metrics.predictions import Prediction
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer
from docs.figures import draw_diagrams, draw_example

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"


def test_the_diagrams_are_as_their_script_draws_them() -> None:
    assert (FIGURES / "pipeline.svg").read_text(encoding="utf-8") == draw_diagrams.pipeline()
    assert (FIGURES / "grpo_step.svg").read_text(encoding="utf-8") == draw_diagrams.grpo_step()


def test_figures_are_small_and_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for file in (*FIGURES.glob("*.svg"), *FIGURES.glob("*.png")):
        assert file.stat().st_size < 200_000, file
        assert f"figures/{file.name}" in pages, file


def test_the_readme_quotes_the_drawn_answer() -> None:
    answer = json.loads((FIGURES / "example.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = " ".join(readme.split())
    assert " ".join(answer["text"].split()) in quoted and f"{answer['iou']:.2f}" in quoted


def test_an_example_is_taken_from_stored_answers(tmp_path: Path) -> None:
    truth, sizes = BoxAnswer(0, (0.1, 0.1, 0.5, 0.5), "kite"), (ImageSizes((40, 40), (56, 56)),)
    known = {
        "column": "diff",
        "unit": "diff",
        "answer": truth,
        "box_format": BoxFormat.ABSOLUTE_PIXELS,
        "image_sizes": sizes,
    }
    known |= {"num_tokens": 3, "finished": True, "refused": None}
    answers = [
        Prediction(id=f"mig_bench/{k}", text=f"text {k}", value=k / 3, read=truth.box, **known) for k in range(3)
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(answer.to_json()) + "\n" for answer in answers))
    taken = draw_example.take(tmp_path / "predictions.jsonl", "mig_bench/2", "a model")
    assert taken == {"id": "mig_bench/2", "model": "a model", "text": "text 2", "box": truth.box, "iou": 0.67}


def test_citation_and_license_are_those_of_the_package() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == metadata["metadata"]["version"]
    assert citation["license"] == metadata["metadata"]["license"] == "Apache-2.0"
    license_text = (ROOT / metadata["metadata"]["license_files"]).read_text(encoding="utf-8")
    assert "Apache License" in license_text and "Version 2.0, January 2004" in license_text
