"""Find settings of a training module that cannot work. Each problem is a text with the field and its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.policy_module import PolicyModule


def policy_faults(module: PolicyModule) -> list[str]:
    """The problems among the settings of `PolicyModule`; empty if there are none."""
    faults = module.lora.faults() if module.lora is not None else []
    # Numbers outside their range.
    for name in ("learning_rate", "accumulate", "max_tokens_per_row"):
        if getattr(module, name) <= 0:
            faults.append(f"{name}={getattr(module, name)} must be greater than 0")
    if not 0 <= module.warmup_fraction < 1:
        faults.append(f"warmup_fraction={module.warmup_fraction} must be in [0, 1)")
    if module.max_grad_norm is not None and module.max_grad_norm <= 0:
        faults.append(f"max_grad_norm={module.max_grad_norm} must be greater than 0, or null")
    if module.activation_gib is not None and not (module.gradient_checkpointing and module.activation_gib > 0):
        faults.append(
            f"activation_gib={module.activation_gib} must be greater than 0, with gradient_checkpointing=True, "
            f"not {module.gradient_checkpointing}; or null"
        )
    # Precision of the weights.
    if module.dtype_name not in ("float32", "bfloat16"):  # float16 would need a loss scaler
        faults.append(f"dtype={module.dtype_name!r} must be 'float32' or 'bfloat16'")
    elif module.dtype_name == "bfloat16" and (module.lora is None or not module.freeze_vision):
        # LoRA adapters are always float32. Weights that are trained without LoRA have the dtype of the model.
        name = "lora=None" if module.lora is None else f"freeze_vision={module.freeze_vision}"
        faults.append(
            f"dtype={module.dtype_name!r} with {name}: updates of a small learning rate are smaller than half the last "
            "digit of a bfloat16 weight and would be rounded away; use dtype='float32'"
        )
    return faults
