"""The results of the benchmark as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PHASES = ("data", "encode", "rollout", "reference", "forward", "backward", "optimizer", "other")
# The lower bound has finer phases: a measured rollout consists of two of them.
PARTS = {"rollout": ("prefill", "decode")}


def case_table(result: Mapping[str, Any]) -> str:
    """One case as a table: the seconds of each contender and the lower bound, by phase and in total."""
    contenders, bound = result["contenders"], result.get("lower_bound", {"phases": {}})
    names = list(contenders)
    # Phases that any contender has.
    lines = [headline(result), _row(["", *names, "lower bound"])]
    for phase in PHASES:
        seconds = [contenders[name]["phases"].get(phase) for name in names]
        if any(value is not None for value in seconds):
            parts = PARTS.get(phase, (phase,))
            least = sum(bound["phases"][part]["seconds"] for part in parts if part in bound["phases"])
            lines.append(_row([phase, *(_number(value) for value in seconds), _number(least or None)]))
    # The whole step.
    total = [_number(contenders[name]["seconds"]) for name in names]
    lines.append(_row(["step, seconds", *total, _number(bound.get("seconds"))]))
    lines.append(_row(["processor seconds", *(_number(contenders[name]["cpu_seconds"]) for name in names)]))
    lines.append(_row(["tokens/s", *(f"{contenders[name]['tokens_per_second']:.0f}" for name in names)]))
    if any(contenders[name]["rollout_tokens_per_second"] for name in names):
        rates = [_number(contenders[name]["rollout_tokens_per_second"]) for name in names]
        lines.append(_row(["tokens/s of the rollout", *rates]))
    lines.append(_row(["peak GB", *(f"{contenders[name]['peak_bytes'] / 1e9:.2f}" for name in names)]))
    return "\n".join([*lines, *_verdict(result)])


def _verdict(result: Mapping[str, Any]) -> list[str]:
    """The ratio of both contenders, and the shares of the lower bound, as far as they were measured."""
    lines = []
    if "ratio" in result:
        by_turn = ", ".join(f"{ratio:.2f}" for ratio in result["ratio_by_turn"])
        processor = f"of processor time {result['cpu_ratio']:.2f}"
        first, second = result["contenders"]
        lines.append(f"seconds, {second} / {first}: {result['ratio']:.2f} (by turn {by_turn}; {processor})")
    if "rollout_rate" in result:
        lines.append(f"tokens/s of the rollout, {first} / {second}: {result['rollout_rate']:.2f}")
    if "lower_bound_share" in result:
        lines.append(f"lower bound / step: {result['lower_bound_share']:.1%}")
    if "decode_share" in result:
        a_token = result["decoding"]["seconds_a_token"]
        lines.append(f"decoding: {1000 * a_token:.2f} ms a token, lower bound / this: {result['decode_share']:.1%}")
    return lines


def headline(result: Mapping[str, Any]) -> str:
    """The workload of a case in one line."""
    work = result["workload"]
    width, height = work["image_size"]
    completions = f"{work['prompts']} prompts x {work['group_size']} completions of {work['completion_tokens']} tokens"
    if work["task"] == "sft":
        completions = f"{work['prompts']} samples of about {work['completion_tokens']} words"
    of_variants = [
        f"; {name}: {', '.join(f'{field}={value}' for field, value in changes.items())}"
        for name, changes in result["variants"].items()
        if changes
    ]
    return (
        f"{result['shape']} {result['case']}: {completions}, {work['images']} images of {width}x{height}, "
        f"LoRA {work['lora_rank']}, {work['dtype']}{''.join(of_variants)}"
    )


def growth_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each case; "x first" is the time of its step divided by that of the first case of its kind."""
    lines = [_row(["", "contender", "step s", "x first", "rollout s", "tokens/s", "peak GB", "bound/step"])]
    first: dict[tuple[str, str], float] = {}  # (kind of case, contender) -> seconds of its first case
    for result in results:
        for name, contender in result["contenders"].items():
            kind = (result["case"].split("=")[0], name)
            base = first.setdefault(kind, contender["seconds"])
            share = f"{result['lower_bound_share']:.1%}" if name == "ours" else ""
            cells = [_number(contender["seconds"]), f"{contender['seconds'] / base:.2f}"]
            cells += [_number(contender["phases"].get("rollout")), f"{contender['tokens_per_second']:.0f}"]
            lines.append(_row([result["case"], name, *cells, f"{contender['peak_bytes'] / 1e9:.2f}", share]))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:<28}" + "".join(f"{cell:>12}" for cell in rest)
