"""Words for what is true of a scene: the thinking texts of the nano world. Several wordings for each thought.

Which one is used follows from the question's wording: there a policy has nothing to guess, and GRPO no noise to learn
from."""

from __future__ import annotations

from collections.abc import Sequence

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def thorough_thinking(reasons: Sequence[str], name: str, image: int, wording: int = 0) -> str:
    """Why this thing, and in which image it is; `reasons` say the same in other words. `wording` is any number."""
    reason = reasons[wording % len(reasons)]
    texts = (
        f"{reason} is the {name}. Find it in image {image + 1}.",
        f"{reason} is the {name}. Locate it in picture {image + 1}.",
        f"So the {name}: {reason[0].lower()}{reason[1:]}. It is in image {image + 1}.",
    )
    return texts[wording % len(texts)]


def short_thinking(image: int) -> str:
    """Short thinking: in which image to look, but not for which object. It is true, and helps little."""
    return f"Look at image {image + 1}."
