"""Complete small data sets in the forms of a user's own data, with the boxes that they must become.

Every maker takes the true boxes in 0-1 and writes them as its form does. Values and sentences are made up; fields are
those of the forms' own documents (`datamodules/importers/own_data/forms.py` names them).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.importers.own_data.statement import Coordinates
from datamodules.samples.boxes import fit_size
from tests.datamodules.importers.published import jpeg

Box = tuple[float, float, float, float]
SIZES = ((64, 48), (40, 80), (100, 100))  # of image k: (width, height) in pixels
LIMITS = [784, 10_000]  # pixels that images are resized to, in the tests of resized pixels
NUM_RECORDS = 10
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def write_images(root: Path) -> None:
    """<root>/images/k.jpg of SIZES[k]."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(SIZES):
        (root / "images" / f"{number}.jpg").write_bytes(jpeg(number, size))


def true_boxes(count: int = NUM_RECORDS, seed: int = 0) -> list[tuple[int, Box]]:
    """(image, box in 0-1) of each record; the image is 0 or 1. The edges are whole pixels of every size in SIZES."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        x1, x2 = sorted(rng.sample(range(5), 2))
        y1, y2 = sorted(rng.sample(range(5), 2))
        found.append((rng.randrange(2), (x1 / 4, y1 / 4, x2 / 4, y2 / 4)))
    return found


def numbers(box: Box, size: tuple[int, int], coordinates: Coordinates) -> list[float]:
    """A box as a form writes it: an independent inverse of the importer's conversion."""
    width, height = {
        "pixels": size,
        "resized_pixels": fit_size(size, 28, *LIMITS),
        "relative_1000": (1000, 1000),
        "normalized": (1, 1),
    }[coordinates.removesuffix("_xywh")]
    x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return [x1, y1, x2 - x1, y2 - y1] if coordinates.endswith("_xywh") else [x1, y1, x2, y2]


def qwen(number: int, image: int, values: Sequence[float]) -> dict[str, Any]:
    """Qwen's `messages`, with Qwen2.5-VL's JSON."""
    which = ("first", "second")[image]
    answer = (
        f"It is in the {which} image.\n```json\n" + json.dumps([{"bbox_2d": list(values), "label": "kite"}]) + "\n```"
    )
    return {
        "id": f"q{number}",
        "messages": [
            SYSTEM,
            {"role": "user", "content": "<image>\n<image>\nWhich kite is in one picture alone?"},
            {"role": "assistant", "content": answer},
        ],
        "images": ["images/0.jpg", "images/1.jpg"],
    }


def qwen_parts(number: int, image: int, values: Sequence[float]) -> dict[str, Any]:
    """The same in parts that bring their images along."""
    record = qwen(number, image, values)
    parts = [{"type": "image", "image": name} for name in record.pop("images")]
    record["messages"][1]["content"] = [*parts, {"type": "text", "text": "Which kite is in one picture alone?"}]
    return record


def sharegpt(number: int, image: int, values: Sequence[float]) -> dict[str, Any]:
    """ShareGPT's and LLaVA's `conversations`, two questions a record, with Qwen2-VL's markup."""
    x1, y1, x2, y2 = (f"{value:.10g}" for value in values)
    marked = f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    return {
        "id": number,
        "image": ["images/0.jpg", "images/1.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nFind the <|object_ref_start|>kite<|object_ref_end|>."},
            {"from": "gpt", "value": f"<think>Only one shows it.</think>In image-{image + 1}: {marked}"},
            {"from": "human", "value": "And its tail?"},
            {"from": "gpt", "value": f"It is in the {image + 1}th image: {marked}"},
        ],
    }


def swift(number: int, image: int, values: Sequence[float], kind: str | None = None) -> dict[str, Any]:
    """ms-swift's `objects`; a box of the question is in the other image."""
    objects: dict[str, Any] = {
        "ref": ["kite", "its tail"],
        "bbox": [[0, 0, *values[2:]], list(values)],
        "image_id": [image, image],
    }
    return {
        "messages": [
            SYSTEM,
            {"role": "user", "content": "<image><image>Beside <bbox> there is a <ref-object>. Find it."},
            {"role": "assistant", "content": "<ref-object><bbox>"},
        ],
        "images": ["images/0.jpg", "images/1.jpg"],
        "objects": objects | ({"bbox_type": kind} if kind else {}),
    }


def trl(number: int, image: int, values: Sequence[float]) -> dict[str, Any]:
    """TRL's `prompt` and `images` for GRPO, with the answer in a column of its own."""
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Where is the kite?"}]
    return {
        "id": f"t{number}",
        "prompt": [{"role": "user", "content": parts}],
        "images": ["images/0.jpg", "images/1.jpg"],
        "solution": list(values),
        "image_id": image,
        "label": "kite",
    }


def trl_completion(number: int, image: int, values: Sequence[float]) -> dict[str, Any]:
    """TRL's prompt-completion type with texts."""
    record = trl(number, image, values)
    del record["solution"]
    completion = [{"role": "assistant", "content": json.dumps({"bbox_2d": list(values), "label": "kite"})}]
    return record | {"prompt": [{"role": "user", "content": "Where is the kite?"}], "completion": completion}


FORMS = {
    "qwen": qwen,
    "qwen_parts": qwen_parts,
    "sharegpt": sharegpt,
    "trl": trl,
    "trl_completion": trl_completion,
}


def records(form: str, coordinates: Coordinates = "pixels", count: int = NUM_RECORDS) -> list[dict[str, Any]]:
    """Records of a form with `true_boxes`."""
    return [
        FORMS[form](number, image, numbers(box, SIZES[image], coordinates))
        for number, (image, box) in enumerate(true_boxes(count))
    ]


def write_jsonl(root: Path, lines: Sequence[Any], name: str = "train.jsonl") -> Path:
    """`root` with images and a file of records, one a line."""
    write_images(root)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in lines)
    (root / name).write_text(text, encoding="utf-8")
    return root
