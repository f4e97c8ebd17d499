"""The boxes of one answer as detections, by COCO's protocol: what average precision needs to know of an answer.

MC-Bench's true boxes are in groups ("people with the same role" are several). The group of a box is its label, "group
2". A box with another label, or without one, is of group 1. No model gives a confidence, so all scores are equal, and
boxes count in the order in which they are written.

The official script renames the groups of an answer by their overlap with the true groups. But it reads the answers
again for each question, so that its renaming is lost for all questions but the last one. Its rule here
(`reader: mc_bench`) is therefore without renaming. This project's rule renames in every question.
"""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.benchmarks.base import Rule
from datamodules.benchmarks.mc_bench import group_of
from datamodules.samples.box_matching import MAX_EXTRA, BoxMatching, WrittenBox, best_pairing
from datamodules.samples.boxes import iou
from datamodules.samples.sample import BoxAnswer

MAX_DETECTIONS = 100  # of one group in one image; further ones do not count, as in COCO
NO_IMAGE = -1  # the image of a box that names none of the question's images
Detection = tuple[int, int, int]  # (group, image, 1 if it has a true box of its own, else 0)


def find_detections(written: Sequence[WrittenBox], true: Sequence[BoxAnswer], rule: Rule) -> tuple[Detection, ...]:
    """The written boxes with their groups and hits, in the order written.

    A box takes the free true box of its group and image with which it has the largest IoU, if that counts by the rule.

    Args:
        written: the boxes of the answer.
        true: the true boxes of the question, whose labels are their groups.
        rule: whose `counts` decides about hits. With the reader "mc_bench", groups stay as they are written, and boxes
            without an image are left out, because the official files cannot hold them.
    """
    official = rule.reader == "mc_bench"
    names = {} if official else _true_names(written, true)
    free: dict[tuple[int, int], list[BoxAnswer]] = {}
    for answer in true:
        free.setdefault((group_of(answer.label), answer.image), []).append(answer)
    found: list[Detection] = []
    counts: dict[tuple[int, int], int] = {}
    for box in written:
        if box.image is None and official:
            continue
        group = group_of(box.label)
        # Without the official rule, a group that the question does not have is no way to hide a wrong box.
        place = (group if official else names.get(group, 1), NO_IMAGE if box.image is None else box.image)
        counts[place] = counts.get(place, 0) + 1
        if counts[place] <= MAX_DETECTIONS:
            found.append((*place, _take(box, free.get(place, []), rule)))
    return tuple(found)


def _take(box: WrittenBox, free: list[BoxAnswer], rule: Rule) -> int:
    """1 if a free true box counts for this box; that one is then removed from `free`."""
    values = [iou(box.box, answer.box) for answer in free]
    # COCO's matching takes the last of equally good ones.
    best = max(range(len(free)), key=lambda index: (values[index], index), default=None)
    if best is None or not rule.counts(values[best], rule.threshold):
        return 0
    del free[best]
    return 1


def _true_names(written: Sequence[WrittenBox], true: Sequence[BoxAnswer]) -> dict[int, int]:
    """For each group of the answer the true group that it stands for; a group that stands for none is left out.

    It is the assignment with the largest sum of IoUs, where boxes of assigned groups are paired over both images.
    """
    parts: dict[int, list[WrittenBox]] = {}
    for box in written:
        parts.setdefault(group_of(box.label), []).append(box)
    true_groups = sorted({group_of(answer.label) for answer in true})
    sums = []
    for name in true_groups:
        wanted = tuple(answer for answer in true if group_of(answer.label) == name)
        found = {group: BoxMatching(tuple(boxes), wanted).iou_sum for group, boxes in list(parts.items())[:MAX_EXTRA]}
        sums.append({group: value for group, value in found.items() if value > 0.0})
    return {group: true_groups[row] for row, group in best_pairing(sums).items()}


def right_images(detections: Sequence[Detection], true: Sequence[BoxAnswer]) -> bool:
    """Whether exactly the images with a true box have a detection (MC-Bench's image-level accuracy)."""
    return {image for _, image, _ in detections} == {answer.image for answer in true}
