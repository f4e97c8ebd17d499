"""Words for what is true of a scene: the thinking texts of the nano world. Several wordings for each thought."""

from __future__ import annotations

import random

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def conclusion(rng: random.Random, reason: str, name: str, image: int) -> str:
    """Why this thing, and in which image it is."""
    return rng.choice(
        (
            f"{reason} is the {name}. Find it in image {image + 1}.",
            f"{reason} is the {name}. Locate it in picture {image + 1}.",
            f"So the {name}: {reason[0].lower()}{reason[1:]}. It is in image {image + 1}.",
        )
    )
