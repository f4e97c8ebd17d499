"""Model folders that are broken at random: a tensor or a file is dropped, renamed, cut, reshaped or retyped."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 16600000000\n"
TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write one of the folder's weight files anew."""
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = {name: value.clone() for name, value in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def break_at_random(model: Path, folder: Path, seed: int) -> str:
    """Copy `model` to `folder`, break the copy, and say how."""
    shutil.copytree(model, folder)
    rng = random.Random(seed)
    if rng.random() < 0.6:
        return _break_tensor(folder, rng)
    return _break_file(folder, rng)


def _break_tensor(folder: Path, rng: random.Random) -> str:
    told = ""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal told
        name, kind = rng.choice(sorted(tensors)), rng.choice(["drop", "rename", "cut", "reshape", "retype", "spoil"])
        told = f"{kind} {name}"
        value = tensors.pop(name)
        if kind == "rename":
            forms = (f"base_model.model.{name}", f"module.{name}", name.replace("layers.", "layer."), name + "_", "x")
            tensors[next(form for form in rng.sample(forms, len(forms)) if form != name)] = value
        elif kind == "cut":
            tensors[name] = value[: rng.randrange(len(value))] if value.dim() else value.new_zeros(0)
        elif kind == "reshape":
            shapes = [value[None], value.flatten(), value.t() if value.dim() == 2 else value.reshape(2, -1)]
            tensors[name] = rng.choice([shape for shape in shapes if shape.shape != value.shape]).contiguous()
        elif kind == "retype":
            tensors[name] = value.to(rng.choice(TYPES))
        elif kind == "spoil":
            value.flatten()[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
            tensors[name] = value
        return tensors

    change_tensors(folder, change)
    return told


def _break_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["drop", "rename", "cut", "pointer", "empty", "retype"])
    data = file.read_bytes()
    if kind == "drop":
        file.unlink()
    elif kind == "rename":
        file.rename(file.with_name(rng.choice(["old-" + file.name, file.stem + ".bin", file.name + ".part"])))
    elif kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "pointer":
        file.write_text(POINTER)
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.write_text(json.dumps(rng.choice([[], 3, "text", None, {}])))
    return f"{kind} {file.name}"
