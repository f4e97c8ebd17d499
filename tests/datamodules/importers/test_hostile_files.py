"""Imports of files that real folders hold: odd names, repeated ids, boxes in 0-1, photographs that EXIF turns."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from datamodules.importers import odinw
from datamodules.persistence.files import read_json
from datamodules.streaming.shard_reader import ShardReader
from experiments import import_shards
from tests.beside import SHARED
from tests.datamodules.importers import published
from tests.datamodules.photographs import SIZE, STORED, photograph, place_of, unit

CASES = SHARED / "cases/inputs.py"
PLACE = "WildfireSmoke/train"


def run(source: str, root: Path, out: Path, **settings: object) -> dict[str, Any]:
    """Import; the report of its one part."""
    chosen = {"source": source, "root": root, "out": out, "processes": 1, "max_rejected": 1.0} | settings
    import_shards.main([f"--{name}={value}" for name, value in chosen.items()])
    (part,) = read_json(out / "import.json")["parts"].values()
    return part


def samples(out: Path) -> list[Any]:
    reader = ShardReader(out)
    return [reader.read(number) for number in range(reader.count)]


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """The shared COCO files, laid out as a set of ODinW each: <tmp_path>/cases/<case>."""
    if not CASES.is_file():
        pytest.skip(f"{CASES} is not here")
    spec = importlib.util.spec_from_file_location("inputs", CASES)
    inputs: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    inputs.coco_files(tmp_path / "coco")
    for folder in (tmp_path / "coco").iterdir():
        place = tmp_path / "cases" / folder.name / PLACE
        shutil.copytree(folder, place)
        (place / "_annotations.coco.json").rename(place / odinw.FILE)
    return tmp_path / "cases"


def test_the_shared_file_of_a_repeated_image_id_is_refused(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"images\[1\]: field 'id' is 0, as of an earlier record"):
        run("odinw", cases / "repeated_image_id", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_the_shared_boxes_in_0_1_are_counted_under_their_rule(cases: Path, tmp_path: Path) -> None:
    part = run("odinw", cases / "boxes_in_unit", tmp_path / "out", max_rejected=1.0)
    assert part["samples"] == 0 and part["rejected"] == {"box_in_unit": 2}
    assert "where COCO means pixels" in part["examples"]["box_in_unit"][0]
    with pytest.raises(SystemExit, match=r"2 of 2 samples rejected.*\n.*\n.*box_in_unit 2"):
        run("odinw", cases / "boxes_in_unit", tmp_path / "strict", max_rejected=0.2)


def test_the_shared_long_name_is_imported(cases: Path, tmp_path: Path) -> None:
    assert run("odinw", cases / "long_name", tmp_path / "out")["samples"] == 1
    (loaded,) = samples(tmp_path / "out")
    assert loaded.sample.images[0].endswith("k" * 110)
    assert loaded.images[0] == (cases / "long_name" / PLACE / Path(loaded.sample.images[0]).name).read_bytes()


GOOD = ["a.b.c.jpg", ".hidden", "archive.tar.gz", "no_extension", "x.json", "0.jpg", "ü.ßß", "a.JPEG", "b." + "k" * 200]
BAD = ["n" * 300 + ".jpg", "nul\0.jpg", "gone.jpg"]


def test_no_file_name_ends_an_import(tmp_path: Path) -> None:
    content = published.coco_file(len(GOOD) + len(BAD))
    content["annotations"] = content["annotations"][: len(content["images"])]
    folder = tmp_path / "data" / PLACE
    folder.mkdir(parents=True)
    for number, (image, name) in enumerate(zip(content["images"], GOOD + BAD, strict=True)):
        image["file_name"] = name
        if name in GOOD:
            (folder / name).write_bytes(published.jpeg(number))
    (folder / odinw.FILE).write_text(json.dumps(content))
    part = run("odinw", tmp_path / "data", tmp_path / "out")
    assert part["samples"] == len(GOOD) and part["rejected"] == {"missing_image": len(BAD)}
    found = {Path(loaded.sample.images[0]).name: loaded.images[0] for loaded in samples(tmp_path / "out")}
    assert found == {name: published.jpeg(number) for number, name in enumerate(GOOD)}


def test_mgrounding_takes_odd_names_and_counts_what_is_no_file(tmp_path: Path) -> None:
    records = [published.mgrounding_record(number, 2) for number in range(4)]
    published.write_mgrounding(tmp_path / "data", records)
    place = tmp_path / "data" / records[0]["images"][0]
    odd = place.with_name("a.b." + "k" * 150)
    shutil.copy(place, odd)
    records[0]["images"][0] = f"./{odd.relative_to(tmp_path / 'data')}"
    records[1]["images"][1] += "\0"
    records[2]["images"][1] += "n" * 300
    (tmp_path / "data" / published.NAME / f"{published.NAME}.json").write_text(json.dumps(records))
    part = run("mgrounding", tmp_path / "data", tmp_path / "out")
    assert part["samples"] == 2 and part["rejected"] == {"missing_image": 2}


def test_mgrounding_counts_boxes_in_0_1(tmp_path: Path) -> None:
    records = [published.mgrounding_record(number, 2) for number in range(2)]
    records[0]["conversations"][1]["value"] = "<|box_start|>(0.1,0.2),(0.5,0.9)<|box_end|>"
    published.write_mgrounding(tmp_path / "data", records)
    part = run("mgrounding", tmp_path / "data", tmp_path / "out")
    assert part["samples"] == 1 and part["rejected"] == {"box_in_unit": 1}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_photographs_are_imported_where_the_published_boxes_are_in_stored_pixels(
    tmp_path: Path, orientation: int
) -> None:
    data = photograph(orientation)
    x1, y1, x2, y2 = STORED
    content = published.coco_file(1)
    content["images"][0] |= {"width": SIZE[0], "height": SIZE[1]}
    content["annotations"] = [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}]
    published.write_odinw(tmp_path / "od", content)
    (tmp_path / "od" / PLACE / "0.jpg").write_bytes(data)
    part = run("odinw", tmp_path / "od", tmp_path / "out")
    assert part["samples"] == 1
    turned = {} if orientation == 1 else {"turned": {"1 of 1": 1}}
    assert part["counts"] == turned | {"boxes in an answer": {"1": 1}}
    assert samples(tmp_path / "out")[0].sample.answer.box == pytest.approx(place_of(data))

    written = ",".join(f"({round(1000 * x)},{round(1000 * y)})" for x, y in (unit()[:2], unit()[2:]))
    record = published.mgrounding_record(0, 2)
    record["conversations"][1]["value"] = f"<|box_start|>{written}<|box_end|>"
    published.write_mgrounding(tmp_path / "mg", [record], [published.jpeg(0), data])
    assert run("mgrounding", tmp_path / "mg", tmp_path / "mg_out")["samples"] == 1
    assert samples(tmp_path / "mg_out")[0].sample.answer.box == pytest.approx(place_of(data), abs=1e-3)


def test_v3det_rejects_turned_photographs_whose_frame_nobody_says(tmp_path: Path) -> None:
    published.write_v3det(tmp_path / "v3")
    (tmp_path / "v3/images/n00/0_x.jpg").write_bytes(published.jpeg(0, orientation=6))
    part = run("v3det", tmp_path / "v3", tmp_path / "out")
    assert part["rejected"] == {"turned_image": 1} and part["samples"] == 1
