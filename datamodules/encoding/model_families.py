"""For each family of models: how the prompt asks for a box, and how the model writes it.

The box format is a property of the model, documented by its authors. It is never guessed from the numbers that the
model writes. If the authors document no format, the prompt asks for one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from datamodules.encoding.messages import ANSWER_SUFFIX, OFFICIAL_ENDING, OFFICIAL_QWEN_SUFFIX, QUESTION_BOX
from datamodules.samples.boxes import BoxFormat

_STATED_SCALE = (
    " Answer with the bounding box only, written as [x1, y1, x2, y2]: left, top, right and bottom, as numbers from 0 to"
    " 1 relative to the width and height of the image that holds the object."
)


@dataclass(frozen=True)
class ModelFamily:
    """The prompt and the box format of one family."""

    name: str
    models: str  # regex that is searched in a model's name; upper and lower case are equal
    box_format: BoxFormat
    suffix: str  # text after a grounding question
    question_box: str = QUESTION_BOX  # notation of a box inside a question, with four "{}" for its numbers
    before_image: str = ""  # label before each image; "{}" becomes the number of the image, from 1
    after_image: str = ""  # text after each image
    factor: int | None = None  # the processor resizes sides to multiples of this; needed if boxes are in pixels
    source: str = ""  # where the format and the prompt come from


_QWEN2_VL = ModelFamily(
    name="qwen2_vl",
    models=r"qwen2[-_]?vl",
    box_format=BoxFormat.RELATIVE_1000,
    suffix=OFFICIAL_QWEN_SUFFIX,
    question_box="<|box_start|>({},{}),({},{})<|box_end|>",
    source="Qwen2-VL: 0-1000; MIG-Bench's prompt",
)
_STATED = ModelFamily("stated", r"(?!)", BoxFormat.NORMALIZED, _STATED_SCALE, source="scale named in the prompt")

# The first family whose regex matches is taken, so specific names must be before general names.
MODEL_FAMILIES = (
    ModelFamily(
        name="qwen2_5_vl",
        models=r"qwen2[._]?5[-_]?vl",
        box_format=BoxFormat.ABSOLUTE_PIXELS,
        suffix=ANSWER_SUFFIX,
        factor=28,
        source="Qwen2.5-VL: JSON, pixels of the resized image",
    ),
    ModelFamily(
        name="qwen3_vl",
        models=r"qwen3([._]\d)?[-_]?vl",
        box_format=BoxFormat.RELATIVE_1000,
        suffix=ANSWER_SUFFIX,
        source="Qwen3-VL: JSON, 0-1000",
    ),
    replace(_QWEN2_VL, name="migician", models=r"migician", source="Migician: as Qwen2-VL; MIG-Bench's prompt"),
    _QWEN2_VL,
    ModelFamily(
        name="internvl",
        models=r"internvl",
        box_format=BoxFormat.RELATIVE_1000,
        suffix=f"Format:<box>[[x1,y1,x2,y2]]</box>. {OFFICIAL_ENDING}",
        question_box="[{},{},{},{}]",
        before_image="Image-{}: ",
        after_image="\n",
        source="InternVL 1.5 to 3: 0-1000; MIG-Bench's prompt",
    ),
    ModelFamily(
        name="minicpm_v",
        models=r"minicpm-?v",
        box_format=BoxFormat.RELATIVE_1000,
        suffix=f"Format:<box>x1 y1 x2 y2</box>. {OFFICIAL_ENDING}",
        question_box="<box>{} {} {} {}</box>",
        source="MiniCPM-V 2.6: 0-1000, separated by spaces; MIG-Bench's prompt",
    ),
    ModelFamily(
        name="llava_onevision",
        models=r"llava[-_]?(onevision|ov)",
        box_format=BoxFormat.NORMALIZED,
        suffix=f" Format:<box>[x1, y1, x2, y2]</box>. {OFFICIAL_ENDING}",
        source="LLaVA-OneVision: 0-1; MIG-Bench's prompt",
    ),
    # The authors document no format: the prompt asks for numbers from 0 to 1.
    replace(_STATED, name="mplug_owl3", models=r"mplug-?owl-?3"),
    replace(_STATED, name="mantis", models=r"mantis"),
    replace(_STATED, name="gpt_4o", models=r"gpt-4"),
    replace(_STATED, source="for any other model: scale named in the prompt"),
)


def find_model_family(name: str, *models: str) -> ModelFamily:
    """The model family with this name; for "auto" the first family whose regex matches a name of the model.

    Args:
        name: name of a family, or "auto".
        models: names of one model, such as the model_type of its config and its folder. The first name that a family
            matches decides.

    Raises:
        ValueError: no family has this name, or "auto" finds no family. A box format is never guessed.
    """
    known = {model_family.name: model_family for model_family in MODEL_FAMILIES}
    names = ", ".join(known)
    if name in known:
        return known[name]
    if name != "auto":
        raise ValueError(f"model_family={name!r} is not auto or one of {names}")
    for model in models:
        for model_family in MODEL_FAMILIES:
            if re.search(model_family.models, model, re.IGNORECASE):
                return model_family
    raise ValueError(f"model={models[-1]!r} is of no known family: set model family to one of {names}")
