"""Further wordings of the in-domain questions, for training. MGrounding-630k has varied wordings too; MIG-Bench has one
for each task.

A policy that is trained with one wording for each task answers only this wording well.
"""

from __future__ import annotations

import random
import re

from datamodules.synthetic.puzzles import Puzzle
from datamodules.synthetic.thinking_texts import ORDINALS

# The place in a question's text for the box of the only object in image 1. Some questions of real data have such a box.
BOX = "<box>"
# {n} and {nth}: number of the image or region that the question asks about, from 1. {picture}: number of the image that
# shows the region.
REWORDINGS = {
    "common_object": (
        "One object appears in all of these images. Find it in image {n}.",
        "Which object do all images share? Locate it in the {nth} image.",
        "Every image shows the same object. Give its bounding box in picture {n}.",
        "Recognize what the images have in common and locate it in image-{n}.",
    ),
    "diff": (
        "What is different in the second image? Locate it.",
        "These two images differ in one object. Find it in image-2.",
        "Look at both images and give the bounding box of what has changed in the second one.",
        "Find the difference of image 1 and image 2 and locate it in image 2.",
    ),
    "region": (
        "The first image is the source image, the others are regions of it. Find region {n} in the source image.",
        "Where is the {nth} region in the first image?",
        "Locate what picture {picture} shows in the first image.",
        "Find the area of the source image that region picture {n} shows.",
    ),
    "refer_grounding": (
        "Image-1 shows one object. Where is it in image-2?",
        "Find the object of the first image in the second image.",
        "Locate what image 1 shows in image 2.",
        "The object in the first image is in the second image too. Give its bounding box there.",
        f"The object at {BOX} in image 1 is also in image 2. Locate it there.",
        f"Look at {BOX} in the first image and find the same object in the second image.",
        f"Image 1 shows an object {BOX}. Recognize it and locate it in the image-2.",
    ),
}


def reworded(rng: random.Random, puzzle: Puzzle) -> tuple[str, int]:
    """(question, number of the wording): the question of a puzzle in a random wording, which may be its own wording.

    Only for in-domain tasks.
    """
    wordings = REWORDINGS[puzzle.task]
    choice = rng.randrange(len(wordings) + 1)
    if choice == len(wordings):
        return puzzle.question, choice  # the benchmark's own wording
    asked = re.search(r"(\d+)th", puzzle.question)  # MIG-Bench writes "2th" and "3th" too
    n = int(asked[1]) if asked else puzzle.target + 1
    return wordings[choice].format(n=n, nth=ORDINALS[n - 1], picture=n + 1), choice
