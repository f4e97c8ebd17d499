"""Words for what is true of a scene: the thinking texts of the nano world. Several wordings for each thought."""

from __future__ import annotations

import random
from collections.abc import Sequence

from datamodules.synthetic.single_image import enumerate_names
from datamodules.synthetic.world import Scene

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def pictures(rng: random.Random, scenes: Sequence[Scene]) -> str:
    """All images in order, in one wording."""
    word = rng.choice(("Image", "Picture"))
    return " ".join(f"{word} {k + 1}: {enumerate_names(scene.things)}." for k, scene in enumerate(scenes))


def conclusion(rng: random.Random, reason: str, name: str, image: int) -> str:
    """The last sentence: why this thing, and in which image it is."""
    return rng.choice(
        (
            f"{reason} is the {name}. Find it in image {image + 1}.",
            f"{reason} is the {name}. Locate it in picture {image + 1}.",
            f"So the {name}: {reason[0].lower()}{reason[1:]}. It is in image {image + 1}.",
        )
    )
