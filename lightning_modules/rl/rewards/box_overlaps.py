"""The overlap of two boxes: IoU, and variants that also distinguish near misses from far misses.

IoU is 0 for every box that does not touch the true box. The variants subtract a penalty, so a near miss has a higher
value than a far miss, and a reward can rank completions that all miss. The variants come from torchvision; IoU is the
project's own.
"""

from __future__ import annotations

from typing import Literal

import torch

from datamodules.samples.boxes import Box, iou

OverlapKind = Literal["iou", "giou", "diou", "ciou"]

# The infimum of each kind. It is also the value of a box without an area. A reward should give this value if there is
# no readable box; with 0 instead, a model would get more by writing no box than by missing.
LOWEST: dict[OverlapKind, float] = {"iou": 0.0, "giou": -1.0, "diou": -1.0, "ciou": -1.5}
# Added to denominators, as an area in 0-1 coordinates: far below the area of one pixel, and above the rounding of
# float64.
_EPS = 1e-12


def overlap(kind: OverlapKind, predicted: Box, truth: Box) -> float:
    """The overlap of two xyxy boxes of the same image and space, from `LOWEST[kind]` to 1; never NaN.

    With c the smallest box that encloses both, d the distance of the two centres:

        giou = iou - (area(c) - union) / area(c)            Rezatofighi et al. 2019, eq. in Alg. 1
        diou = iou - d^2 / diagonal(c)^2                    Zheng et al. 2020, eqs. 6 and 7
        ciou = diou - alpha * v                             Zheng et al. 2020, eqs. 8 to 11
               v = 4/pi^2 * (difference of the two atan(width / height))^2,  alpha = v / (1 - iou + v)

    A degenerate, inverted or non-finite box has `LOWEST[kind]`.

    Args:
        kind: which overlap.
        predicted: the box of a model, x1, y1, x2, y2.
        truth: the true box.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in LOWEST:
        raise ValueError(f"overlap={kind!r} is none of {', '.join(LOWEST)}")
    if kind == "iou":
        return iou(predicted, truth)
    if iou(predicted, predicted) == 0.0 or iou(truth, truth) == 0.0:  # a box without an area
        return LOWEST[kind]
    import torchvision.ops  # takes half a second, which commands without a reward do not need

    # [1, 4] each, in float64 like the project's IoU.
    boxes = [torch.tensor([box], dtype=torch.float64) for box in (predicted, truth)]
    if kind == "giou":
        value = torchvision.ops.generalized_box_iou(*boxes)
    elif kind == "diou":
        value = torchvision.ops.distance_box_iou(*boxes, eps=_EPS)
    else:
        value = torchvision.ops.complete_box_iou(*boxes, eps=_EPS)
    # Numbers near the limits of float64 overflow; such a box is far from any true box.
    value = value.nan_to_num(nan=LOWEST[kind], posinf=LOWEST[kind], neginf=LOWEST[kind])
    return min(max(value.item(), LOWEST[kind]), 1.0)
