"""The records that the documents show are complete: they import as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from datamodules.benchmarks.mig_bench import load_mig_bench
from datamodules.importers import mgrounding, odinw, refcoco
from datamodules.importers.own_data import coco, jsonl
from datamodules.importers.own_data.statement import COORDINATES, OwnData
from datamodules.samples.sample import BoxAnswer, LoadedSample, Sample
from tests.datamodules.importers import published
from tests.datamodules.importers.own_data import own_files

DOCS = Path(__file__).resolve().parents[4] / "docs"
RECORD = re.compile(r"<!-- record: (\w+) ?(\w*) -->\n```json\n(.*?)```", re.DOTALL)
RECORDS = RECORD.findall((DOCS / "own_data.md").read_text(encoding="utf-8"))
# The records of published sources stand before the section on imports.
SOURCES = (DOCS / "data.md").read_text(encoding="utf-8").partition("## An import")[0]
PUBLISHED = re.findall(r"\*\*([\w-]+).*?```json\n(.*?)```", SOURCES, re.DOTALL)


@pytest.mark.parametrize(("source", "box_format", "text"), RECORDS)
def test_each_record_of_own_data_imports_as_it_stands(tmp_path: Path, source: str, box_format: str, text: str) -> None:
    root = own_files.write_jsonl(tmp_path, [json.loads(text)])
    own = OwnData(box_format=box_format or None)
    if source == "coco":
        (root / "train.jsonl").rename(root / "train.json")
        scan = coco.scan(root, (), own)
    else:
        scan = jsonl.scan(root, (), own)
    (loaded,) = [one for entries in scan.subsets.values() for one in scan.convert(entries)]
    assert isinstance(loaded, LoadedSample)
    image = len(loaded.sample.images) - 1
    assert loaded.sample.answer == BoxAnswer(image, (0.125, 0.25, 0.375, 0.75), "red kite")


def test_there_is_a_record_of_every_form_and_a_row_of_every_format() -> None:
    fields = {name for source, _, text in RECORDS if source == "jsonl" for name in json.loads(text)}
    assert {"messages", "conversations", "objects", "prompt"} <= fields
    assert [source for source, _, _ in RECORDS].count("coco") == 1
    page = (DOCS / "own_data.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in COORDINATES)


def test_the_published_records_import_as_they_stand(tmp_path: Path) -> None:
    found = {name: json.loads(text) for name, text in PUBLISHED}
    published.write_mgrounding(tmp_path / "mg", [found["MGrounding-630k"]])
    scan = mgrounding.scan(tmp_path / "mg")
    (sample,) = scan.convert(scan.subsets["group_grounding"])
    assert isinstance(sample, Sample) and sample.answer.image == 1 and sample.answer.label == "a red kite"

    published.write_odinw(tmp_path / "od", found["ODinW"])
    (entry,) = odinw.scan(tmp_path / "od").subsets["WildfireSmoke/train"]
    assert entry.box == [10.0, 20.0, 30.5, 40.0]

    published.write_refcoco(tmp_path / "rc", [found["RefCOCO"]])
    (tmp_path / "rc/refcoco/instances.json").write_text(json.dumps(found["ODinW"]))
    (entry,) = refcoco.scan(tmp_path / "rc").subsets["refcoco_unc/train"]
    assert entry.phrase == "the lady in blue" and entry.box == [10.0, 20.0, 30.5, 40.0]
    (tmp_path / "MIG_data.json").write_text(json.dumps([found["MIG_data"]]))
    (question,) = load_mig_bench(tmp_path / "MIG_data.json")
    assert question.answer == BoxAnswer(1, (0.418, 0.391, 0.595, 0.546), "")
    assert set(found) == {"MGrounding-630k", "RefCOCO", "ODinW", "MIG_data"}
