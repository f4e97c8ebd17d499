"""Rule-based rewards of the paper's section 3.3. Pure: text and geometry in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.answers import ParseFailure, is_well_formed, parse_answer
from datamodules.boxes import Convention, ImageGeometry, iou
from datamodules.samples import BoxAnswer


@dataclass(frozen=True)
class Reward:
    """Reward of one completion and the parts it is made of.

    `Reward(total=1.1, accuracy=0.6, format=1.0, failure=None)` is a well-formed answer whose box has IoU 0.6.
    """

    total: float  # eq. 3
    accuracy: float  # r_acc, the IoU itself, 0-1
    format: float  # r_format, 0 or 1
    failure: str | None  # why no box could be read (a kind of `answers.ParseFailure`), else None

    @property
    def iou(self) -> float:
        """r_acc under its other name: the paper's accuracy reward is the IoU."""
        return self.accuracy


def reward(
    text: str,
    answer: BoxAnswer,
    geometries: Sequence[ImageGeometry],
    convention: Convention,
    accuracy_weight: float = 1.0,
    format_weight: float = 0.5,
) -> Reward:
    """r = λ_acc · IoU + λ_format · format (eq. 3) for one completion.

    The numbers in `text` are read in the model's `convention` and in the geometry of the answer's own image
    (`answer.image`), never guessed from the numbers nor from the true box. Where several boxes are written, the
    first counts: more boxes can not raise the reward. A text without a readable box has r_acc 0 and names the failure.
    Raises ValueError when `answer` is not one box or names an image that has no geometry.
    """
    if not isinstance(answer, BoxAnswer):
        raise ValueError(f"reward needs an answer of one box, got {type(answer).__name__}")
    if not 0 <= answer.image < len(geometries):
        raise ValueError(f"answer is in image {answer.image}, but there are {len(geometries)} images")
    parsed = parse_answer(text)
    if isinstance(parsed, ParseFailure):
        accuracy, failure = 0.0, parsed.kind
    else:
        predicted = geometries[answer.image].to_unit(parsed.boxes[0].values, convention)
        accuracy, failure = iou(predicted, answer.box), None
    well_formed = float(is_well_formed(text))
    return Reward(accuracy_weight * accuracy + format_weight * well_formed, accuracy, well_formed, failure)
