"""Rule-based rewards of the paper's section 3.3. Pure: text and sizes in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer
from datamodules.samples.scores import score_text


@dataclass(frozen=True)
class Reward:
    """Reward of one completion and the parts it is made of.

    `Reward(total=1.1, accuracy=0.6, format=1.0, failure=None)` is a well-formed answer whose box has IoU 0.6.
    """

    total: float  # eq. 3
    accuracy: float  # r_acc, the IoU itself, 0-1
    format: float  # r_format, 0 or 1
    failure: str | None  # why no box could be read (a kind of `answer_text.ParseFailure`), else None


def reward(
    text: str,
    answer: BoxAnswer,
    image_sizes: Sequence[ImageSizes],
    box_format: BoxFormat,
    accuracy_weight: float = 1.0,
    format_weight: float = 0.5,
) -> Reward:
    """r = λ_acc · IoU + λ_format · format (eq. 3) for one completion, scored by `score_text`, with its errors."""
    score = score_text(text, answer, image_sizes, box_format)
    well_formed = float(score.well_formed)
    total = accuracy_weight * score.iou + format_weight * well_formed
    return Reward(total, score.iou, well_formed, score.failure)
