"""ReVOS-Grounding: questions about a video (Yan et al., VISA), shown as several frames.

The answer is a box in one frame.

    ReVOS/JPEGImages/<video>/<frame>.jpg   mask_dict.json   meta_expressions_valid_.json

As in the paper, six frames are sampled uniformly and the answer refers to one of them. The paper does not say which.
Here it is the third, as in UniVG-R1, or the nearest one that shows the object. The box surrounds the masks of all
objects of the expression. The authors of ReVOS read frames with OpenCV, which applies EXIF's rotation, so the masks
refer to the rotated frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.benchmarks.base import (
    PAPER,
    Benchmark,
    Rule,
    file_benchmark,
    make_sample,
    read_object,
    require_fields,
    require_types,
)
from datamodules.benchmarks.mig_bench import ORDINALS
from datamodules.benchmarks.reading.masks import rle_box, union_box
from datamodules.samples.boxes import from_pixels_clipped
from datamodules.samples.sample import Sample

NAME, FOLDER = "revos", "ReVOS"
COLUMNS = ("ReVOS",)
TYPES = {0: "referring", 1: "reasoning"}  # 2: expressions without a target; the official averages skip them too
AVERAGES = {"avg": COLUMNS}
RULE = Rule(source=PAPER)
OFFICIAL = Rule(source="UniVG-R1 eval/zero_shot: first box, IoU >= 0.5 (ReVOS itself scores masks)", inclusive=True)
QUESTION = (
    "This is a sequence of images from a video. Please understand the entire video content, and then output the"
    " bounding box in the {} image according to the instruction: {}"
)


def load(root: Path, num_frames: int = 6, grounded: int = 2) -> Benchmark:
    """Load the benchmark. `grounded` is the 0-based position of the wanted frame among the `num_frames` sampled frames.

    Raises ValueError that names a missing field, FileNotFoundError for a missing file.
    """
    if not 0 <= grounded < num_frames <= len(ORDINALS):
        raise ValueError(f"grounded={grounded} must be one of num_frames={num_frames}, at most {len(ORDINALS)}")
    meta = read_object(root / "meta_expressions_valid_.json")
    require_fields(meta, ("videos",), "meta_expressions_valid_.json")
    require_types(meta, "meta_expressions_valid_.json", videos=Mapping)
    # {annotation id: one RLE or null for each frame of its video}.
    masks = read_object(root / "mask_dict.json")
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    for video, content in meta["videos"].items():
        require_fields(content, ("frames", "expressions"), f"video {video}")
        require_types(content, f"video {video}", frames=list, expressions=Mapping)
        for number, expression in content["expressions"].items():
            where = f"{video}, expression {number}"
            require_fields(expression, ("exp", "anno_id", "type_id"), where)
            require_types(expression, where, exp=str, anno_id=list)
            if expression["type_id"] not in TYPES:
                dropped[f"type_id {expression['type_id']}"] += 1
                continue
            # Sample frames of the video, and choose the frame to which the answer refers.
            places = sample_frames(len(content["frames"]), num_frames)
            found = _find(expression["anno_id"], masks, places, grounded, where)
            if found is None:
                dropped["object in no sampled frame"] += 1
                continue
            names = [f"JPEGImages/{video}/{content['frames'][place]}.jpg" for place in places]
            target, box, size = found
            question = QUESTION.format(ORDINALS[target], expression["exp"])
            answer = {"image": target, "box": box, "label": ""}
            task = TYPES[expression["type_id"]]
            extra = {"column": COLUMNS[0], "size": size}
            samples.append(make_sample(NAME, f"{video}/{number}", task, names, question, answer, **extra))

    return file_benchmark(NAME, samples, root, RULE, OFFICIAL, AVERAGES, dict(dropped), frame="shown")


def sample_frames(count: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames out of `count`, at the middles of equal spans; all frames if there are fewer."""
    if count <= num_frames:
        return list(range(count))
    # (index + 1/2) * count / num_frames in integers, so that rounding is equal on all machines.
    return [(2 * index + 1) * count // (2 * num_frames) for index in range(num_frames)]


def _find(
    annotations: list[Any], masks: Mapping[str, Any], places: list[int], grounded: int, where: str
) -> tuple[int, list[float], list[int]] | None:
    """(index, unit box, [width, height]) of the sampled frame nearest to the wanted one that shows an object."""
    # Nearest frame first. The earlier one wins if two are equally near.
    for index in sorted(range(len(places)), key=lambda index: (abs(index - grounded), index)):
        found = []
        for annotation in annotations:
            frames = masks.get(str(annotation))
            if not isinstance(frames, list) or len(frames) <= places[index]:
                raise ValueError(f"{where}: mask_dict.json has no frame {places[index]} of anno_id {annotation}")
            if frames[places[index]] is not None:
                found.append(frames[places[index]])
        try:
            box = union_box([rle_box(rle) for rle in found])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"frame {places[index]} in mask_dict.json holds no mask in COCO's run lengths"
            raise ValueError(f"{where}: {what}: {error!r}") from error
        if box is not None:
            # COCO's RLE states height before width; boxes need (width, height).
            height, width = found[0]["size"]
            return index, from_pixels_clipped(box, (width, height)), [width, height]
    return None
