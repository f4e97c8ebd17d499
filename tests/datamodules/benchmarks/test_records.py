"""Records of benchmarks' files: what a question is made of, and records that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from datamodules.benchmarks import blink, odinw, ref_l4
from datamodules.encoding.messages import PromptStyle, build_messages
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import Sample, SampleError
from datamodules.synthetic.benchmark_replicas.write import write_replica


def odinw_replica(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The replica's root, and one of its annotation files with what that holds."""
    write_replica("odinw", folder, count=4)
    path = folder / "odinw/PascalVOC/valid" / odinw.FILE
    return folder / "odinw", path, json.loads(path.read_text())


def test_blink_puts_its_disclaimer_before_two_subsets_in_the_official_style_alone(tmp_path: Path) -> None:
    published = (
        "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give "
        "your assessment on this question. You don't need to identify the real people. You just need to analyze based "
        "on the information I gave you.\n\n"
    )
    image_sizes = [ImageSizes((100, 100), (100, 100))] * 4
    write_replica("blink", tmp_path, count=4)
    for sample in blink.load(tmp_path / "BLINK").samples:
        plain = sample.messages[-1].text

        def asked(style: PromptStyle, sample: Sample = sample) -> list[dict]:
            images = image_sizes[: len(sample.images)]
            return build_messages(sample, images, BoxFormat.ABSOLUTE_PIXELS, style)[0]["content"]

        official = published + plain if sample.task in ("Forensic_Detection", "Jigsaw") else plain
        assert asked(PromptStyle.OFFICIAL)[-1] == {"type": "text", "text": official}
        assert [part["type"] for part in asked(PromptStyle.OFFICIAL)] == ["image"] * len(sample.images) + ["text"]
        for style in (PromptStyle.THINK, PromptStyle.ANSWER, PromptStyle.PLAIN):
            assert asked(style)[-1]["text"].startswith(plain.rstrip())


def test_an_odinw_image_or_category_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    root, path, coco = odinw_replica(tmp_path)
    for what in ("images", "categories", "annotations"):
        repeated = coco | {what: [*coco[what], coco[what][0]]}
        path.write_text(json.dumps(repeated))
        with pytest.raises(ValueError, match=rf"PascalVOC/valid: {what}\[\d+\]: field 'id' is \d+, as of an earlier"):
            odinw.load(root)
    path.write_text(json.dumps(coco | {"images": [image | {"id": [1]} for image in coco["images"]]}))
    with pytest.raises(ValueError, match=r"images\[0\]: id=\[1\] is neither"):
        odinw.load(root)


def test_boxes_in_0_1_where_pixels_are_meant_are_counted_by_name(tmp_path: Path) -> None:
    root, path, coco = odinw_replica(tmp_path)
    for annotation in coco["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.5, 0.5]
    path.write_text(json.dumps(coco))
    benchmark = odinw.load(root)
    assert benchmark.dropped["box in 0-1, not pixels"] > 0
    assert "PascalVOC" not in {sample.task for sample in benchmark.samples}


def test_ref_l4_counts_boxes_in_0_1_by_name(tmp_path: Path) -> None:
    write_replica("ref_l4", tmp_path, count=4)
    path = tmp_path / "Ref-L4/ref-l4-val.parquet"
    rows = [row | {"bbox": [0.25, 0.5, 0.75, 0.5]} for row in parquet.read_table(path).to_pylist()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    benchmark = ref_l4.load(tmp_path / "Ref-L4")
    assert benchmark.dropped == {"box in 0-1, not pixels": 4}
    assert {sample.extra["column"] for sample in benchmark.samples} == {"test"} and len(benchmark.samples) == 4


@pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "a\0b.jpg"])
def test_a_name_that_no_file_can_have_is_that_questions_fault_alone(name: str, tmp_path: Path) -> None:
    root, path, coco = odinw_replica(tmp_path)
    coco["images"][0]["file_name"] = name
    path.write_text(json.dumps(coco))
    refused = 0
    benchmark = odinw.load(root)
    for sample in benchmark.samples:
        try:
            benchmark.load(sample)
        except SampleError as error:
            assert error.rule == "missing_image" and error.sample_id.startswith("odinw/PascalVOC/0/")
            refused += 1
    assert refused > 0
