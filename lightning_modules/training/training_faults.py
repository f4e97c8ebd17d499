"""Find settings of a training module that cannot work. Each problem is a text with the field and its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.persistence.problems import Problems

if TYPE_CHECKING:
    from lightning_modules.policy_module import PolicyModule


def policy_faults(module: PolicyModule) -> Problems:
    """Problems of the settings that `PolicyModule` itself has."""
    problems = Problems()
    problems.extend(module.lora.faults() if module.lora is not None else [])
    problems.positive(
        learning_rate=module.learning_rate, accumulate=module.accumulate, max_tokens_per_row=module.max_tokens_per_row
    )
    fraction, activations = module.warmup_fraction, module.activation_gib
    problems.require(0 <= fraction < 1, "must be in [0, 1)", warmup_fraction=fraction)
    problems.positive_or_null(max_grad_norm=module.max_grad_norm)
    problems.require(
        activations is None or (module.gradient_checkpointing and activations > 0),
        f"must be greater than 0, with gradient_checkpointing=True, not {module.gradient_checkpointing}; or null",
        activation_gib=activations,
    )
    problems.one_of(("float32", "bfloat16"), dtype=module.dtype_name)  # float16 would need a loss scaler
    if module.dtype_name == "bfloat16" and (module.lora is None or not module.freeze_vision):
        # LoRA adapters are always float32. Weights that are trained without LoRA have the dtype of the model.
        name = "lora=None" if module.lora is None else f"freeze_vision={module.freeze_vision}"
        problems.append(
            f"dtype={module.dtype_name!r} with {name}: updates of a small learning rate are smaller than half the last "
            "digit of a bfloat16 weight and would be rounded away; use dtype='float32'"
        )
    return problems
