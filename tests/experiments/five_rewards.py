"""Five rewards of a user, as they would lie beside a YAML: none is known to the project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_modules.rl.rewards.completion import Completion


def short(completion: Completion) -> float:
    """1 for no token, 0 for a completion that is cut at the limit."""
    return 1 - completion.num_tokens / completion.max_tokens


def mentions(completion: Completion, least: int = 1) -> bool:
    """Whether the text names the object at least so often."""
    labels = [true.label.lower() for true in completion.true_boxes]
    return sum(completion.text.lower().count(label) for label in labels) >= least


class CentreInside:
    """1 where the centre of the first box lies in a true box of the same image."""

    range = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        for written in completion.boxes[:1]:
            x, y = (written.box[0] + written.box[2]) / 2, (written.box[1] + written.box[3]) / 2
            return any(
                true.image == written.image and true.box[0] <= x <= true.box[2] and true.box[1] <= y <= true.box[3]
                for true in completion.true_boxes
            )
        return 0.0


class Vowels:
    """Minus the distance of the share of vowels from `wanted`."""

    range = (-1.0, 0.0)

    def __init__(self, wanted: float) -> None:
        self.wanted = wanted

    def __call__(self, completion: Completion) -> float:
        share = sum(letter in "aeiou" for letter in completion.text) / max(len(completion.text), 1)
        return -abs(share - self.wanted)


class Rare:
    """1 for a text that no other completion of the step has; all completions are scored together."""

    def score_batch(self, completions: Sequence[Completion]) -> list[float]:
        counts = Counter(completion.text for completion in completions)
        return [1 / counts[completion.text] for completion in completions]
