"""Ref-L4 (Chen et al.): long referring expressions, each about one image.

    Ref-L4/ref-l4-val.parquet, ref-l4-test.parquet   id, caption, bbox [x, y, w, h] in pixels, file_name, width, …
    Ref-L4/images/…                                  images.tar.gz unpacked; file_name is the name in it

The official rule is IoU > 0.5 too, averaged over annotations. The official class-macro accuracy maps COCO's classes to
those of Objects365 with a table in its code; here, `within=macro` averages over `ori_category_id` without that table.
The official code reads images as they are stored.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.benchmarks.base import (
    IN_UNIT,
    NUMBER,
    PAPER,
    Benchmark,
    Rule,
    file_benchmark,
    is_xywh,
    make_sample,
    require_types,
)
from datamodules.benchmarks.reading.parquet import read_rows
from datamodules.images.image_files import file_size
from datamodules.samples.boxes import from_pixels_clipped, is_unit_xywh
from datamodules.samples.sample import Sample

NAME, FOLDER = "ref_l4", "Ref-L4"
COLUMNS = ("val", "test")
AVERAGES = {"avg": COLUMNS}
RULE = Rule(source=PAPER)
OFFICIAL = Rule(source="ref_l4/evaluation.py: IoU > 0.5, over annotations")
QUESTION = "Locate the region that this sentence describes: {}"
_FIELDS = ("id", "caption", "bbox", "file_name", "ori_category_id", "width", "height")


def load(root: Path) -> Benchmark:
    """Raises ValueError that names a missing column, and FileNotFoundError for a missing file."""
    rows = [
        _sample(row, split, position)
        for split in COLUMNS
        for position, row in enumerate(read_rows(root / f"ref-l4-{split}.parquet", _FIELDS))
    ]
    samples = [sample for sample in rows if sample is not None]
    # The names in the archive may hold its folder already.
    inside = samples and file_size(root / samples[0].images[0]) is not None
    folder = root if inside else root / "images"
    dropped = {IN_UNIT: len(rows) - len(samples)}
    return file_benchmark(NAME, samples, folder, RULE, OFFICIAL, AVERAGES, dropped, frame="stored")


def _sample(row: dict, split: str, position: int) -> Sample | None:
    """The question, or None if its box is in 0-1."""
    where = f"ref-l4-{split}.parquet, row {position}"
    require_types(row, where, caption=str, file_name=str, width=NUMBER, height=NUMBER)
    if not is_xywh(row["bbox"]):
        raise ValueError(f"{where}: bbox={row['bbox']} is not [x, y, w, h]")
    size = (row["width"], row["height"])
    if is_unit_xywh(row["bbox"], size):
        return None
    x, y, w, h = row["bbox"]
    answer = {"image": 0, "box": from_pixels_clipped((x, y, x + w, y + h), size), "label": ""}
    name, task, question = f"{split}/{row['id']}", str(row["ori_category_id"]), QUESTION.format(row["caption"])
    return make_sample(NAME, name, task, [row["file_name"]], question, answer, column=split, size=list(size))
