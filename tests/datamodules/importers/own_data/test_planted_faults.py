"""A thousand records with planted faults: each is refused under a rule that names it, and none becomes a wrong box.

Every record of a file is sound but for one fault of a kind that the numbers, the form or the files give away. What
nothing gives away, such as a box that is simply somewhere else, no importer can find.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.importers.own_data import coco, hf, jsonl
from datamodules.importers.own_data.statement import OwnData
from datamodules.importers.reading.source import Scan
from datamodules.samples.sample import BoxAnswer, LoadedSample, SampleError
from tests.datamodules.importers.own_data import own_files
from tests.datamodules.importers.own_data.own_files import FORMS, SIZES, numbers
from tests.datamodules.importers.published import jpeg

OWN = OwnData(box_format="pixels", max_misfits=1.0)  # record by record, not the file as a whole
NUM_RECORDS = 1000
Record = dict[str, Any]


# --- faults of the numbers: they change the true box before a form writes it -----------------------------------------
def beyond(box: list[float], size: tuple[int, int], rng: random.Random) -> list[float]:
    return [box[0], box[1], size[0] + rng.uniform(1.5, 900), box[3]]


def before(box: list[float], size: tuple[int, int], rng: random.Random) -> list[float]:
    return [-rng.uniform(1.5, 900), box[1], box[2], box[3]]


def inverted(box: list[float], size: tuple[int, int], rng: random.Random) -> list[float]:
    return rng.choice([[box[2], box[1], box[0], box[3]], [box[0], box[3], box[2], box[1]]])


def flat(box: list[float], size: tuple[int, int], rng: random.Random) -> list[float]:
    return [box[0], box[1], box[0], box[3]]


def in_unit(box: list[float], size: tuple[int, int], rng: random.Random) -> list[float]:
    return [box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]]


def per_mille_outside(box: list[float], size: tuple[int, int], rng: random.Random) -> list[float]:
    """0-1000 where the image is smaller: seen where it leaves the image, as here."""
    return [1000 * box[0] / size[0], 1000 * box[1] / size[1], 1000.0, 1000.0]


NUMBERS = (beyond, before, inverted, flat, in_unit, per_mille_outside)


# --- faults of the record: they change what the form wrote ----------------------------------------------------------
def no_such_image(record: Record, rng: random.Random) -> None:
    _set_image(record, f"images/gone{rng.randrange(99)}.jpg")


def out_of_the_folder(record: Record, rng: random.Random) -> None:
    _set_image(record, rng.choice(["../0.jpg", "images/../../0.jpg", "/etc/hostname", "file:///etc/hostname"]))


def a_url(record: Record, rng: random.Random) -> None:
    _set_image(record, rng.choice(["https://example.org/0.jpg", "s3://b/0.jpg", "data:image/png;base64,AA"]))


def one_image_too_few(record: Record, rng: random.Random) -> None:
    if "completion" in record:  # without tags nothing counts the images: there the box names one that is not there
        record["image_id"] = rng.choice([2, 7, -1])
        return
    for name in ("images", "image"):
        if name in record:
            record[name] = record[name][:1]
    for turn in _turns(record):
        if isinstance(turn.get("content"), list) and turn["content"][0].get("image"):
            turn["content"] = [{"type": "image"}, *turn["content"][1:]]


def lost_roles(record: Record, rng: random.Random) -> None:
    _turns(record)[-1].update(rng.choice([{"role": "narrator", "from": "narrator"}, {"content": None, "value": None}]))


def two_bodies(record: Record, rng: random.Random) -> None:
    for name in ("messages", "conversations", "prompt"):
        record.setdefault(name, [])


def no_body(record: Record, rng: random.Random) -> None:
    for name in ("messages", "conversations", "prompt"):
        record.pop(name, None)


RECORDS = (no_such_image, out_of_the_folder, a_url, one_image_too_few, lost_roles, two_bodies, no_body)


# --- faults of the line: they change the bytes ----------------------------------------------------------------------
def cut(line: str, rng: random.Random) -> bytes:
    return line[: rng.randrange(2, len(line) - 1)].encode()


def nan(line: str, rng: random.Random) -> bytes:
    return (line[:-1] + ', "score": NaN}').encode()


def twice(line: str, rng: random.Random) -> bytes:
    return (line[:-1] + ', "id": "other"}').encode()


def not_text(line: str, rng: random.Random) -> bytes:
    return line.encode().replace(b"kite", b"k\xffte", 1)


LINES = (cut, nan, twice, not_text)
EXPECTED = {
    "beyond": {"out_of_range_box"},
    "before": {"out_of_range_box"},
    "inverted": {"degenerate_box"},
    "flat": {"degenerate_box"},
    "in_unit": {"box_in_unit"},
    "per_mille_outside": {"out_of_range_box"},
    "no_such_image": {"missing_image"},
    "out_of_the_folder": {"image_path"},
    "a_url": {"remote_image"},
    "one_image_too_few": {"image_tags", "image_index", "image_id"},
    "lost_roles": {"turn_order"},
    "two_bodies": {"unknown_form"},
    "no_body": {"unknown_form"},
    "cut": {"bad_json"},
    "nan": {"bad_json"},
    "twice": {"bad_json"},
    "not_text": {"not_utf8"},
}


def _turns(record: Record) -> list[Record]:
    for name in ("messages", "conversations", "prompt"):
        if isinstance(record.get(name), list) and record[name]:
            return record[name]
    return []


def _set_image(record: Record, name: str) -> None:
    for field in ("images", "image"):
        if field in record:
            record[field] = [name, *record[field][1:]]
    for turn in _turns(record):
        if isinstance(turn.get("content"), list):
            for part in turn["content"]:
                if part.get("image"):
                    part["image"] = name
                    return


def true_box(rng: random.Random, size: tuple[int, int]) -> tuple[float, ...]:
    """Edges at whole pixels, wide enough that no change of a fault leaves a box that could be meant."""
    x1, y1 = rng.randrange(2, size[0] // 3), rng.randrange(2, size[1] // 3)
    x2, y2 = rng.randrange(size[0] // 2, size[0] - 1), rng.randrange(size[1] // 2, size[1] - 1)
    return x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1]


def planted(rng: random.Random, form: str, fault: Callable, number: int) -> tuple[bytes, int, tuple[float, ...]]:
    """The line of a record of `form` with a fault, and the true image and box."""
    image = rng.randrange(2)
    box = true_box(rng, SIZES[image])
    values = [float(round(value)) for value in numbers(box, SIZES[image], "pixels")]
    if fault in NUMBERS:
        values = fault(values, SIZES[image], rng)
    record = FORMS[form](number, image, values)
    if fault in RECORDS:
        fault(record, rng)
    line = json.dumps(record)
    return (fault(line, rng) if fault in LINES else line.encode()), image, box


def outcomes(scan: Scan) -> list[LoadedSample | SampleError]:
    return [one for entries in scan.subsets.values() for one in scan.convert(entries)]


def test_a_thousand_planted_faults_in_the_forms_of_json_lines(tmp_path: Path) -> None:
    own_files.write_images(tmp_path)
    rng = random.Random(1)
    faults = (*NUMBERS, *RECORDS, *LINES)
    lines, kinds, truths = [], [], {}
    for number in range(NUM_RECORDS):
        form, fault = rng.choice(list(FORMS)), faults[number % len(faults)]
        line, image, box = planted(rng, form, fault, number)
        sound, truth_image, truth_box = planted(rng, form, lambda *_: None, number)  # one beside each
        lines += [line, sound]
        kinds.append(fault.__name__)
        truths[2 * number + 2] = truth_image, truth_box
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = outcomes(jsonl.scan(tmp_path, (), OWN))
    rejected: dict[int, set[str]] = {}
    for one in found:
        place = (one.sample_id if isinstance(one, SampleError) else one.sample.id).split("train:")[1]
        line = int(place.split("/")[0])
        if isinstance(one, SampleError):
            rejected.setdefault(line, set()).add(one.rule)
            assert one.detail, "an error says what it found"
        else:
            image, box = truths[line]  # KeyError: a record with a fault became a sample
            assert isinstance(one.sample.answer, BoxAnswer) and one.sample.answer.image == image
            assert one.sample.answer.box == pytest.approx(box, abs=1e-9)
    for number, kind in enumerate(kinds):
        assert rejected.pop(2 * number + 1) <= EXPECTED[kind], kind
    assert not rejected, "a sound record was rejected"


def test_planted_faults_in_coco_files(tmp_path: Path) -> None:
    rng = random.Random(2)
    size = (64, 48)
    faults: list[Callable[[Record], Any]] = [
        lambda a: a.update(bbox=[a["bbox"][0], a["bbox"][1], 64.0 - a["bbox"][0] + rng.uniform(1.5, 99), a["bbox"][3]]),
        lambda a: a.update(bbox=[-rng.uniform(1.5, 99), *a["bbox"][1:]]),
        lambda a: a.update(bbox=[a["bbox"][0], a["bbox"][1], -a["bbox"][2], a["bbox"][3]]),
        lambda a: a.update(bbox=[value / 100 for value in a["bbox"]]),
        lambda a: a.update(bbox=a["bbox"][:3]),
        lambda a: a.update(bbox=None),
        lambda a: a.update(bbox=[*a["bbox"][:3], "9"]),
        lambda a: a.update(iscrowd=1),
        lambda a: a.update(image_id=10**6),
        lambda a: a.update(category_id=10**6),
        lambda a: a.update(attributes={"rotation": rng.uniform(1, 359)}),
    ]
    images, annotations, truths, picture = [], [], {}, jpeg(0, size)
    for number in range(NUM_RECORDS):
        images.append({"id": number, "file_name": f"{number}.jpg", "width": size[0], "height": size[1]})
        (tmp_path / f"{number}.jpg").write_bytes(picture)
        x1, y1, x2, y2 = (float(round(v)) for v in numbers(true_box(rng, size), size, "pixels"))
        annotation = {"id": number, "image_id": number, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        truths[number] = x1 / 64, y1 / 48, x2 / 64, y2 / 48
        if number % 2:
            faults[(number // 2) % len(faults)](annotation)
        annotations.append(annotation)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "kite"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    found = outcomes(coco.scan(tmp_path, (), OwnData(max_misfits=1.0)))
    good = {int(one.sample.extra["record"]): one.sample.answer for one in found if isinstance(one, LoadedSample)}
    assert sorted(good) == list(range(0, NUM_RECORDS, 2))
    for number, answer in good.items():
        assert isinstance(answer, BoxAnswer) and answer.box == pytest.approx(truths[number], abs=1e-9)
    counts = Counter(one.rule for one in found if isinstance(one, SampleError))
    assert counts.total() == NUM_RECORDS // 2 and len(counts) == 10, counts


def test_planted_faults_in_a_saved_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have one schema, so faults of a line or of a missing field cannot be in one row alone."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    datasets.disable_progress_bars()
    own_files.write_images(tmp_path / "pictures")
    rng = random.Random(3)
    faults = (*NUMBERS, no_such_image, out_of_the_folder, a_url, one_image_too_few)
    rows, kinds, truths = [], {}, {}
    for number in range(250):
        fault = faults[number % len(faults)]
        for kind in (fault, None):  # a sound row beside each
            line, image, box = planted(rng, "qwen", kind or (lambda *_: None), number)
            kinds[len(rows)], truths[len(rows)] = kind, (image, box)
            rows.append(json.loads(line))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "kites")
    hf._open.cache_clear()
    own = OwnData(box_format="pixels", max_misfits=1.0, images=str(tmp_path / "pictures"))
    seen = set()
    for one in outcomes(hf.scan(tmp_path / "kites", (), own)):
        place = one.sample_id if isinstance(one, SampleError) else one.sample.id
        row = int(place.split("all:")[1].split("/")[0])
        seen.add(row)
        if kinds[row] is not None:
            assert isinstance(one, SampleError) and one.rule in EXPECTED[kinds[row].__name__], (kinds[row], one)
        else:
            assert isinstance(one, LoadedSample), one
            image, box = truths[row]
            assert one.sample.answer.image == image and one.sample.answer.box == pytest.approx(box, abs=1e-9)
    assert seen == set(range(500))
