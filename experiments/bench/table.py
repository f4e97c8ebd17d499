"""Results as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PHASES = ("data", "encode", "rollout", "reference", "forward", "backward", "optimizer", "other")
# Phases of the floor that a measured phase holds.
PARTS = {"rollout": ("prefill", "decode")}


def case_table(result: Mapping[str, Any]) -> str:
    """Phases of one case: seconds of each contender, the floor, and how it was shared."""
    contenders, floor = result["contenders"], result.get("floor", {"phases": {}})
    names = list(contenders)
    lines = [headline(result), _row(["", *names, "floor"])]
    for phase in PHASES:
        seconds = [contenders[name]["phases"].get(phase) for name in names]
        if any(value is not None for value in seconds):
            parts = PARTS.get(phase, (phase,))
            least = sum(floor["phases"][part]["seconds"] for part in parts if part in floor["phases"])
            lines.append(_row([phase, *(_number(value) for value in seconds), _number(least or None)]))
    total = [_number(contenders[name]["seconds"]) for name in names]
    lines.append(_row(["step, seconds", *total, _number(floor.get("seconds"))]))
    lines.append(_row(["processor seconds", *(_number(contenders[name]["cpu_seconds"]) for name in names)]))
    lines.append(_row(["tokens/s", *(f"{contenders[name]['tokens_per_second']:.0f}" for name in names)]))
    lines.append(_row(["peak GB", *(f"{contenders[name]['peak_bytes'] / 1e9:.2f}" for name in names)]))
    return "\n".join([*lines, *_verdict(result)])


def _verdict(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if "ratio" in result:
        by_turn = ", ".join(f"{ratio:.2f}" for ratio in result["ratio_by_turn"])
        processor = f"of processor time {result['cpu_ratio']:.2f}"
        lines.append(f"TRL / ours: {result['ratio']:.2f} (by turn {by_turn}; {processor})")
    if "floor_share" in result:
        lines.append(f"share of the floor: {result['floor_share']:.1%}")
    if "decode_share" in result:
        a_token = result["decoding"]["seconds_a_token"]
        lines.append(f"decoding: {1000 * a_token:.2f} ms a token, {result['decode_share']:.1%} of its bound")
    return lines


def headline(result: Mapping[str, Any]) -> str:
    work = result["workload"]
    width, height = work["image_size"]
    completions = f"{work['prompts']} prompts x {work['group_size']} completions of {work['completion_tokens']} tokens"
    if work["task"] == "sft":
        completions = f"{work['prompts']} samples of about {work['completion_tokens']} words"
    return (
        f"{result['shape']} {result['case']}: {completions}, {work['images']} images of {width}x{height}, "
        f"LoRA {work['lora_rank']}, {work['dtype']}"
    )


def growth_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each case, with what its step takes against the first of its kind."""
    lines = [_row(["", "contender", "step s", "x first", "rollout s", "tokens/s", "peak GB", "of floor"])]
    first: dict[tuple[str, str], float] = {}
    for result in results:
        for name, contender in result["contenders"].items():
            kind = (result["case"].split("=")[0], name)
            base = first.setdefault(kind, contender["seconds"])
            share = f"{result['floor_share']:.1%}" if name == "ours" else ""
            cells = [_number(contender["seconds"]), f"{contender['seconds'] / base:.2f}"]
            cells += [_number(contender["phases"].get("rollout")), f"{contender['tokens_per_second']:.0f}"]
            lines.append(_row([result["case"], name, *cells, f"{contender['peak_bytes'] / 1e9:.2f}", share]))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:<28}" + "".join(f"{cell:>12}" for cell in rest)
