"""ReasonSeg's masks, against OpenCV called as LISA's own code calls it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.benchmarks import lisa
from datamodules.benchmarks.reading.polygons import draw_mask, points_fault, polygons_box
from datamodules.synthetic.benchmark_replicas.write import write_replica
from experiments import evaluate

cv2 = pytest.importorskip("cv2", reason="no OpenCV: pip install -e '.[benchmarks]'")
LABELS = ("target", "target", "Ignore", "flag", "ignored area", "a flagship")


def official_mask(shapes: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The published rules, step by step: each region alone for its area, then all, the largest first."""
    kept = [shape for shape in shapes if shape["label"].lower() != "flag"]

    def paint(canvas: np.ndarray, shape: dict[str, Any], value: int) -> np.ndarray:
        corners = np.array([shape["points"]], dtype=np.int32)
        cv2.polylines(canvas, corners, True, value, 1)
        cv2.fillPoly(canvas, corners, value)
        return canvas

    areas = [paint(np.zeros((height, width), np.uint8), shape, 1).sum() for shape in kept]
    canvas = np.zeros((height, width), np.uint8)
    for index in np.argsort(areas)[::-1].tolist():
        paint(canvas, kept[index], 255 if "ignore" in kept[index]["label"].lower() else 1)
    return canvas


def official_box(mask: np.ndarray) -> tuple[float, ...] | None:
    places = np.argwhere(mask == 1)
    if not len(places):
        return None
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0) + 1
    return float(left), float(top), float(right), float(bottom)


def random_shapes(rng: random.Random, width: int, height: int, outside: float) -> list[dict[str, Any]]:
    """One to five regions with corners in any order, so that many cross themselves; of one or two corners now and then.

    `outside` is how far corners may leave the image, in sizes of it.
    """

    def corner() -> list[float]:
        x, y = (rng.uniform(-outside, 1 + outside) * total for total in (width, height))
        return [x, y] if rng.random() < 0.7 else [float(round(x)), float(round(y))]

    counts = [rng.choice((1, 2, 3, 4, 5, 9)) for _ in range(rng.randint(1, 5))]
    return [{"label": rng.choice(LABELS), "points": [corner() for _ in range(count)]} for count in counts]


@pytest.mark.parametrize("outside", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_masks_and_boxes_are_the_official_ones(outside: float, count: int) -> None:
    rng = random.Random(f"polygons {outside}")
    left_empty = crossed = 0
    for _ in range(count):
        width, height = rng.randint(1, 90), rng.randint(1, 90)
        shapes = random_shapes(rng, width, height, outside)
        polygons = [(shape["points"], lisa._value(shape["label"])) for shape in lisa._drawn(shapes)]
        expected = official_mask(shapes, height, width)
        np.testing.assert_array_equal(draw_mask(polygons, (width, height)), expected)
        assert polygons_box(polygons, (width, height)) == official_box(expected)
        left_empty += official_box(expected) is None
        crossed += any(len(shape["points"]) >= 5 for shape in shapes)
    assert crossed > count / 4 and left_empty < count * 3 / 4  # the cases are of the kinds that they are meant to be


def square(x1: int, y1: int, x2: int, y2: int) -> list[list[float]]:
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def test_a_polygons_box_holds_its_outline() -> None:
    assert polygons_box([(square(2, 3, 6, 8), 1)], (20, 10)) == (2, 3, 7, 9)
    assert polygons_box([(square(2, 3, 6, 8), 1), (square(10, 1, 12, 4), 1)], (20, 10)) == (2, 1, 13, 9)


def test_a_smaller_ignored_polygon_cuts_into_the_target_and_a_larger_one_does_not() -> None:
    target = (square(2, 2, 12, 8), 1)
    assert polygons_box([target, (square(9, 1, 13, 9), 255)], (20, 10)) == (2, 2, 9, 9)
    assert polygons_box([target, (square(0, 0, 19, 9), 255)], (20, 10)) == (2, 2, 13, 9)
    assert polygons_box([(square(2, 2, 4, 4), 255)], (20, 10)) is None


def test_regions_of_equal_size_are_drawn_in_the_official_order() -> None:
    rng = random.Random(3)
    for _ in range(100):
        shapes = []
        for _ in range(rng.randint(2, 20)):
            x, y = rng.randint(0, 20), rng.randint(0, 20)
            corners = [[x, y], [x + 9, y], [x + 9, y + 9], [x, y + 9]]
            shapes.append({"label": rng.choice(("target", "ignore")), "points": corners})
        polygons = [(shape["points"], lisa._value(shape["label"])) for shape in shapes]
        np.testing.assert_array_equal(draw_mask(polygons, (30, 30)), official_mask(shapes, 30, 30))


def test_the_loader_reads_files_as_the_official_code_does(tmp_path: Path) -> None:
    rng = random.Random(5)
    expected, without = {}, 0
    for split in lisa.COLUMNS:
        (tmp_path / split).mkdir()
        for number in range(30):
            width, height = rng.randint(20, 90), rng.randint(20, 90)
            shapes = random_shapes(rng, width, height, 0.3)
            Image.new("RGB", (width, height)).save(tmp_path / split / f"a.b{number}.jpg")
            record = {"text": ["it"], "is_sentence": False, "shapes": shapes}
            (tmp_path / split / f"a.b{number}.json").write_text(json.dumps(record))
            box = official_box(official_mask(shapes, height, width))
            if box is None:
                without += 1
            else:
                expected[f"lisa/{split}/a.b{number}"] = [v / t for v, t in zip(box, (width, height) * 2, strict=True)]
    benchmark = lisa.load(tmp_path)
    assert {sample.id: list(sample.answer.box) for sample in benchmark.samples} == expected
    assert benchmark.dropped["no target in the mask"] == without > 0


def test_points_in_0_1_are_counted_by_name(tmp_path: Path) -> None:
    write_replica("lisa", tmp_path, count=2)
    path = tmp_path / "ReasonSeg/val/00001.json"
    record = json.loads(path.read_text())
    record["shapes"] = [{"label": "target", "points": [[0.1, 0.2], [0.6, 0.2], [0.6, 1.0]]}]
    path.write_text(json.dumps(record))
    benchmark = lisa.load(tmp_path / "ReasonSeg")
    assert benchmark.dropped["box in 0-1, not pixels"] == 1 and len(benchmark.samples) == 3


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        ([], "is not a list of points"),
        ("points", "is not a list of points"),
        ([[1]], r"holds \[1\], not \[x, y\]"),
        ([[1, "2"]], "not two numbers"),
        ([[1, True]], "not two numbers"),
        ([[1, float("nan")]], "which no image has"),
        ([[1, 3e9]], "which no image has"),
    ],
)
def test_points_that_cannot_be_drawn_name_their_file(points: Any, fault: str, tmp_path: Path) -> None:
    write_replica("lisa", tmp_path, count=2)
    path = tmp_path / "ReasonSeg/val/00001.json"
    record = json.loads(path.read_text())
    record["shapes"].append({"label": "target", "points": points})
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"00001\.json: points of a shape with label='target' .*{fault}"):
        lisa.load(tmp_path / "ReasonSeg")
    assert points_fault([[1, 2.5]]) is None


def test_without_opencv_only_lisa_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    others = ["ref_l4", "revos", "odinw", "blink"]
    found, (fault,) = evaluate.load_benchmarks(["lisa", *others], str(tmp_path), replicas=True)
    assert fault.startswith("lisa: OpenCV is missing") and fault.endswith("pip install -e '.[benchmarks]'")
    assert list(found) == others
    assert lisa.load(tmp_path / "ReasonSeg", boxes="first_shape").samples  # draws nothing
