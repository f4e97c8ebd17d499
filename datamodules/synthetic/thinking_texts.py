"""The thinking texts of the synthetic dataset. They state only what is true of the scenes, in several wordings.

The wording of the question decides the wording of the thinking. If it were random, a policy would have to guess it, and
GRPO would learn from that noise.
"""

from __future__ import annotations

from collections.abc import Sequence

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def thinking_text(reasons: Sequence[str], name: str, image: int, wording: int = 0) -> str:
    """Why this object is the answer, and in which image it is.

    Args:
        reasons: beginnings of a sentence that mean the same, such as "The only object in every image".
        name: the name of the object.
        image: index of its image, from 0.
        wording: any number; it chooses one of the wordings.
    """
    reason = reasons[wording % len(reasons)]
    texts = (
        f"{reason} is the {name}. Find it in image {image + 1}.",
        f"{reason} is the {name}. Locate it in picture {image + 1}.",
        f"So the {name}: {reason[0].lower()}{reason[1:]}. It is in image {image + 1}.",
    )
    return texts[wording % len(texts)]
