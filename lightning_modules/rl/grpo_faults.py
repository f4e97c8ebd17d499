"""What cannot work in GRPO's settings, as sentences that name the field and its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_modules.rl.losses import REDUCTIONS

if TYPE_CHECKING:
    from lightning_modules.grpo import GRPO


def grpo_faults(module: GRPO) -> list[str]:
    """Faults of the settings that GRPO adds."""
    faults = []
    if module.group_size < 2:
        faults.append(f"group_size={module.group_size}: an advantage needs a group of at least 2")
    positive = ("temperature", "max_new_tokens", "epochs_per_rollout", "minibatches", "rollout_prompts")
    for name in (*positive, "rollout_log_every"):
        if getattr(module, name) <= 0:
            faults.append(f"{name}={getattr(module, name)} must be greater than 0")
    for name, value, known in (
        ("loss_reduction", module.loss_reduction, REDUCTIONS),
        ("old_log_probs", module.old_log_probs, ("trainer", "engine")),
        ("engine", module.engine_name, ("native", "vllm")),
    ):
        if value not in known:
            faults.append(f"{name}={value!r} must be one of {known}")
    if module.beta < 0:
        faults.append(f"beta={module.beta} must not be negative")
    if module.clip_range is not None and not 0 < module.clip_range < 1:
        faults.append(f"clip_range={module.clip_range} must be in (0, 1), or null")
    for name in ("importance_cap", "max_idle_windows"):
        if (value := getattr(module, name)) is not None and value <= 0:
            faults.append(f"{name}={value} must be greater than 0, or null")
    if module.importance_cap is not None and module.updates_per_window > 1 and module.old_log_probs == "engine":
        faults.append(f"importance_cap={module.importance_cap} with old_log_probs='engine': it is in the ratio")
    if module.engine_name == "vllm" and (module.lora is None or not module.freeze_vision):
        faults.append(
            f"engine='vllm' with lora={module.lora}, freeze_vision={module.freeze_vision}: servers are sent an adapter "
            "of the language model, and nothing else"
        )
    return faults
