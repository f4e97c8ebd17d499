"""ODinW: five data sets of "Object Detection in the Wild" (Li et al.). A question names one category of an image.

    odinw/<set>/<split>/annotations_without_background.json and the images beside it (COCO; bbox [x, y, w, h] in pixels)

The paper does not say how it turns detection into questions. Here, a question is an image and a category with exactly
one box in this image, and the score is Acc@0.5. The official score is COCO's mAP for one prompt that names all
categories; it is not computed here. The paper does not name the split either. `valid` was chosen because the paper's
values for Wildfire Smoke are multiples of 1/147, and those for Vector of 1/18; this was not checked against the files.
GLIP, by the authors of ODinW, reads images as they are stored.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import (
    ID,
    IN_UNIT,
    NUMBER,
    PAPER,
    Benchmark,
    Rule,
    by_id,
    file_benchmark,
    is_xywh,
    make_sample,
    read_object,
    require_fields,
    require_types,
)
from datamodules.samples.boxes import from_pixels_clipped, is_unit_xywh
from datamodules.samples.sample import Sample

NAME, FOLDER = "odinw", "odinw"
SETS = {
    "OxfordPets": "OxfordPets/by-breed",
    "PascalVOC": "PascalVOC",
    "WildfireSmoke": "WildfireSmoke",
    "OpenPoetryVision": "openPoetryVision/512x512",
    "Vector": "vector",
}
COLUMNS = tuple(SETS)
AVERAGES = {"avg": COLUMNS}
RULE = Rule(source=PAPER)
OFFICIAL = Rule(
    source="lmms-eval odinw13 ACC@0.5 without its choice of scale: best box, IoU >= 0.5", inclusive=True, box="best"
)
QUESTION = "Locate the {} in this image and output the bbox coordinates in JSON format."  # Qwen2.5-VL's own wording
FILE = "annotations_without_background.json"


def load(root: Path, split: str = "valid") -> Benchmark:
    """Raises ValueError that names a missing field, FileNotFoundError for a missing set."""
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    for column, folder in SETS.items():
        path = root / folder / split / FILE
        if not path.is_file():
            there = sorted(p.parent.name for p in (root / folder).glob(f"*/{FILE}"))
            raise FileNotFoundError(f"{path} is not there; {root / folder} has the splits {there}")
        coco = read_object(path)
        require_fields(coco, ("images", "annotations", "categories"), str(path))
        require_types(coco, str(path), images=list, annotations=list, categories=list)
        samples += _samples(coco, column, f"{folder}/{split}", dropped)

    return file_benchmark(NAME, samples, root, RULE, OFFICIAL, AVERAGES, dict(dropped), frame="stored")


def _samples(coco: dict[str, Any], column: str, folder: str, dropped: Counter[str]) -> list[Sample]:
    categories = by_id(coco["categories"], "categories", folder)
    images = by_id(coco["images"], "images", folder)
    by_id((annotation for annotation in coco["annotations"] if "id" in annotation), "annotations", folder)
    # (image id, category id) -> boxes [x, y, w, h] in pixels.
    boxes: dict[tuple[int, int], list[list[float]]] = {}
    for annotation in coco["annotations"]:
        require_fields(annotation, ("image_id", "category_id", "bbox"), f"{folder}: an annotation")
        require_types(annotation, f"{folder}: an annotation", image_id=ID, category_id=ID)
        boxes.setdefault((annotation["image_id"], annotation["category_id"]), []).append(annotation["bbox"])
    samples = []
    for (image_id, category_id), found in boxes.items():
        if image_id not in images or category_id not in categories:
            raise ValueError(f"{folder}: an annotation has image_id={image_id}, category_id={category_id}, not listed")
        if len(found) != 1:
            dropped["several boxes of the category"] += 1
            continue
        image, category = images[image_id], categories[category_id]
        require_fields(image, ("file_name", "width", "height"), f"{folder}: image {image_id}")
        require_types(image, f"{folder}: image {image_id}", file_name=str, width=NUMBER, height=NUMBER)
        require_fields(category, ("name",), f"{folder}: category {category_id}")
        require_types(category, f"{folder}: category {category_id}", name=str)
        if not is_xywh(found[0]):
            raise ValueError(f"{folder}: image {image_id}: bbox={found[0]!r:.80} is not [x, y, w, h]")
        x, y, w, h = found[0]
        size, label = (image["width"], image["height"]), category["name"]
        if is_unit_xywh(found[0], size):
            dropped[IN_UNIT] += 1
            continue
        name, files = f"{column}/{image_id}/{category_id}", [f"{folder}/{image['file_name']}"]
        answer = {"image": 0, "box": from_pixels_clipped((x, y, x + w, y + h), size), "label": label}
        question = QUESTION.format(spoken(label))
        samples.append(make_sample(NAME, name, column, files, question, answer, size=list(size)))
    return samples


def spoken(name: str) -> str:
    """A category in words: "cat-Abyssinian" and "yorkshire_terrier" get spaces."""
    return name.replace("_", " ").replace("-", " ").strip() or repr(name)
