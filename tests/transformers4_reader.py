"""Loads model folders with another transformers, asks each, and prints what it found as JSON.

`<Python of an environment with transformers 4> tests/transformers4_reader.py FOLDER ...`; it imports nothing of the
project.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def read(folder: str) -> dict:
    processor = AutoProcessor.from_pretrained(folder)
    model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the red ring?"}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    image = Image.effect_mandelbrot((84, 56), (-3, -2.5, 2, 2.5), 50).convert("RGB")
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float()
    return {
        "version": transformers.__version__,
        "gaps": sorted(map(str, [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]])),
        "tokens": len(AutoTokenizer.from_pretrained(folder)),
        "dtype": str(model.dtype),
        "ends": model.generation_config.eos_token_id,
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    print(json.dumps([read(folder) for folder in sys.argv[1:]]))
