"""Measure one case. The contenders take turns. The result has median times, their ratio, and a lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from experiments.bench.cases import Case
from experiments.bench.contender_process import Contender
from experiments.bench.roofline import Peaks, Sizes, step_work

# In a step longer than this, the time to allocate memory again and the time to measure exact phases are negligible.
LONG_STEP_SECONDS = 20.0


def measure(case: Case, model: str, contenders: Mapping[str, Contender], peaks: Peaks) -> dict[str, Any]:
    """Measure a case; returns the result as JSON-like data.

    Args:
        case: the workload, the contenders, and the number of turns and steps.
        model: the model folder.
        contenders: the running processes by name.
        peaks: the machine's peak rates, for the lower bound.

    Raises:
        ValueError: the contenders did not read the same tokens.
    """
    # 1. Both load the model at the same time.
    chosen = {name: contenders[name] for name in case.contenders}
    for name, contender in chosen.items():
        contender.tell(do="train", model=model, workload=asdict(case.workload_of(name)))
    for contender in chosen.values():
        contender.read()
    # 2. The contenders alternate, so that a slow period of the machine affects both. The first contender changes in
    # each turn.
    # contender -> turns -> steps, with untimed steps
    turns: dict[str, list[list[dict]]] = {name: [] for name in chosen}
    for turn in range(case.turns):
        order = list(chosen) if turn % 2 == 0 else list(chosen)[::-1]
        for name in order:
            turns[name].append(_run_turn(chosen[name], case, turns[name]))
    # 3. For our GRPO step, measure the time to decode one token too.
    decoding = {}
    if "ours" in chosen and case.name == "grpo":
        decoding = chosen["ours"].ask(do="decode")
    for contender in chosen.values():
        contender.ask(do="stop")
    _check_inputs(turns)
    result = {
        "case": case.name,
        "workload": asdict(case.workload),
        "variants": case.variants,
        "contenders": {name: _summary(turns[name], case) for name in chosen},
        "decoding": decoding,
    }
    return result | _ratio(result["contenders"]) | _lower_bound(result, case, model, peaks)


def _run_turn(contender: Contender, case: Case, earlier: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run the steps of one turn: untimed steps, then timed steps. `earlier` are the contender's earlier turns."""
    is_long = bool(earlier) and earlier[-1][-1]["seconds"] > LONG_STEP_SECONDS
    untimed = 0 if is_long else case.warmup if earlier else max(case.warmup, 1)
    # To measure phases exactly, the process must wait for the GPU at each phase border, which costs time. So this is
    # done in untimed steps, and in timed steps only if these are long.
    exact = [is_long or index < untimed for index in range(untimed + case.steps)]
    steps = [contender.ask(do="step", exact=is_exact) | {"exact": is_exact} for is_exact in exact]
    contender.ask(do="release")
    return steps


def _check_inputs(turns: Mapping[str, list[list[dict]]]) -> None:
    """Raise ValueError if the contenders have read different tokens in any step."""
    seen = [[step["inputs"] for steps in of_contender for step in steps] for of_contender in turns.values()]
    for number, inputs in enumerate(zip(*seen, strict=False)):  # a contender may have run more untimed steps
        if len(set(inputs)) > 1:
            raise ValueError(f"the contenders read different tokens at step {number}: {' and '.join(turns)}")


def _summary(turns: list[list[dict[str, Any]]], case: Case) -> dict[str, Any]:
    """Medians over the timed steps of one contender."""
    timed = [steps[-case.steps :] for steps in turns]
    flat = [step for steps in timed for step in steps]
    # With warm-up steps (on a GPU), the phases are those of the last exact step; otherwise medians over timed steps.
    phased = [step for steps in turns for step in steps if step["exact"]][-1:] if case.warmup else flat
    seconds = median(step["seconds"] for step in flat)
    tokens = median(step["completion_tokens"] for step in flat)
    sampled = [step for step in phased if step["phases"].get("rollout")]
    names = dict.fromkeys(name for step in phased for name in step["phases"])
    return {
        "seconds": seconds,
        "cpu_seconds": median(step["cpu_seconds"] for step in flat),
        "steps": [[step["seconds"] for step in steps] for steps in timed],
        "phases": {name: median(step["phases"].get(name, 0.0) for step in phased) for name in names},
        "peak_bytes": max(step["peak_bytes"] for step in flat),
        "prompt_tokens": flat[-1]["prompt_tokens"],
        "completion_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "rollout_tokens_per_second": (
            median(step["completion_tokens"] / step["phases"]["rollout"] for step in sampled) if sampled else None
        ),
        "patches": flat[-1].get("patches"),
        "first_loss": turns[0][0].get("loss"),
    }


def _ratio(contenders: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The second contender's seconds divided by those of the first; empty if only one was measured.

    - ratio: of the medians.
    - ratio_by_turn: of the medians of each turn; it shows the spread.
    - cpu_ratio: of CPU time, which is less sensitive to other work on the machine. With one thread and an idle machine
      it equals `ratio`.
    - rollout_rate: the tokens/s of the first contender's rollout divided by those of the second, where both sample.
    """
    if len(contenders) != 2:
        return {}
    first, second = contenders.values()
    by_turn = [median(b) / median(a) for a, b in zip(first["steps"], second["steps"], strict=True)]
    ratios = {
        "ratio": second["seconds"] / first["seconds"],
        "ratio_by_turn": by_turn,
        "cpu_ratio": second["cpu_seconds"] / first["cpu_seconds"],
    }
    rates = [each["rollout_tokens_per_second"] for each in (first, second)]
    return ratios | ({"rollout_rate": rates[0] / rates[1]} if all(rates) else {})


def _lower_bound(result: dict[str, Any], case: Case, model: str, peaks: Peaks) -> dict[str, Any]:
    """The lower bound of a step's time by the roofline model, in total and by phase, and its share of our time."""
    ours = result["contenders"].get("ours")
    if ours is None:
        return {}
    counts = (ours["prompt_tokens"], ours["completion_tokens"], ours["patches"])
    work = step_work(Sizes.read(model), case.workload, *counts)
    phases = {name: asdict(part) | {"seconds": part.seconds(peaks)} for name, part in work.items()}
    seconds = sum(part["seconds"] for part in phases.values())
    values = {"lower_bound": {"seconds": seconds, "phases": phases}, "lower_bound_share": seconds / ours["seconds"]}
    a_token = result["decoding"].get("seconds_a_token")
    if a_token:  # the first token of a completion comes from the prefill
        bound = phases["decode"]["seconds"] / (case.workload.completion_tokens - 1)
        values["decode_share"] = bound / a_token
    return values
