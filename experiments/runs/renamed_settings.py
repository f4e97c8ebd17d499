"""Settings and class paths that have been renamed: an old name ends the command; the message has the new name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

# Class paths in users' YAML files: old prefix -> new prefix.
MOVED = {"callbacks.guards.": "callbacks.save_on_interrupt.", "callbacks.collapse.": "callbacks.collapse_guard."}
# Settings: old name -> new name. A name without dots is refused at any position. A name with dots is refused only at
# the end of a full name, so `temperature` of a model is refused and `temperature` of a callback is not. Names here omit
# `init_args`, because YAML has model.init_args.beta but a flag may be --model.beta.
RENAMED = {
    "convention": "box_format",
    "dialect": "model_family",
    "sides": "contenders",
    "window": "average_over",  # of CollapseGuard
    "twins": "replicas",
    "world": "synthetic_dataset",
    "limit_per_task": "limit",
    "batch_prompts": "prompts_per_batch",
    "model.group_size": "model.rollout.group_size",
    "model.temperature": "model.rollout.temperature",
    "model.max_new_tokens": "model.rollout.max_new_tokens",
    "model.rollout_prompts": "model.rollout.prompts_per_batch",
    "model.engine": "model.rollout.engine",
    "model.vllm": "model.rollout.vllm",
    "model.rollout_log": "model.rollout.log",
    "model.rollout_log_every": "model.rollout.log_every",
    "model.beta": "model.loss.kl_beta",
    "model.clip_range": "model.loss.clip_low and model.loss.clip_high",
    "model.loss_reduction": "model.loss.reduction",
    "model.accuracy_weight": "model.reward_weights.accuracy",
    "model.format_weight": "model.reward_weights.format",
    "model.epochs_per_rollout": "model.update.epochs_per_rollout",
    "model.minibatches": "model.update.minibatches",
    "model.old_log_probs": "model.update.old_log_probs (its value engine is sampler now)",
    "model.skip_equal_groups": "model.update.skip_zero_advantage",
    "model.mask_truncated": "model.update.mask_truncated",
    "model.importance_cap": "model.update.importance_cap",
    "model.max_idle_windows": "model.update.max_idle_windows",
}
LARGEST = 2**16  # characters; a longer file is data, not a configuration, and would take seconds to parse
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z_][\w.]*)")  # --model.beta=0.01, also inside --overrides.grpo="--model.beta=1"


def find_old_flags(text: str) -> list[str]:
    """What to write instead of each old flag in `text`, an argument or a YAML value that holds arguments."""
    return [cure for flag in _FLAG.findall(text) if (cure := _cure(flag)) is not None]


def find_old_names(text: str) -> list[tuple[int, str]]:
    """(line, what to write instead) for each old setting and class path in `text`, a YAML or JSON file.

    Settings are found by their position in the document. For a file that is not YAML, nothing is returned; its reader
    reports the error.
    """
    found = [
        (number, f"{old}* has moved. Write {moved}* instead")
        for number, line in enumerate(text.splitlines(), 1)
        for old, moved in MOVED.items()
        if old in line.split(" #")[0]
    ]
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader) if len(text) <= LARGEST else None
    except yaml.YAMLError:
        root = None
    return sorted(found if root is None else [*found, *_walk(root, "")])


def _walk(node: yaml.Node, place: str) -> Iterator[tuple[int, str]]:
    """Old names at and below a node; `place` is its full name."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            full = f"{place}.{key.value}" if place else str(key.value)
            if (cure := _cure(full)) is not None:
                yield key.start_mark.line + 1, cure
            else:
                yield from _walk(value, full)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _walk(entry, place)
    else:
        yield from ((node.start_mark.line + 1, cure) for cure in find_old_flags(str(node.value)))


def _cure(full: str) -> str | None:
    """What to write instead of the setting with this full name; None if it is not an old name."""
    parts = [part for part in full.split(".") if part != "init_args"]
    for old, new in RENAMED.items():
        if parts[-old.count(".") - 1 :] == old.split("."):
            return f"the setting {old} has been renamed. Write {new} instead"
    return None


def refuse_moved(arguments: Sequence[str] | None, moved: Mapping[str, str]) -> None:
    """End the program if the command line, or a YAML file that it names, has settings at its top level that are now in
    a group; the message lists all of them.

    Args:
        arguments: the command line; None means the command line of this process.
        moved: old name -> the new one, such as {"style": "form.style"}.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    words = {text for argument in arguments for text in (argument, argument.partition("=")[2])}
    found = [("--", argument[2:].partition("=")[0]) for argument in arguments if argument.startswith("--")]
    for file in sorted(Path(word) for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()):
        found += [(f"{file}: ", line.partition(":")[0]) for line in file.read_text(errors="replace").splitlines()]
    if problems := [f"  - {where}{name}: write {moved[name]}" for where, name in found if name in moved]:
        sys.exit("\n".join(["settings that have moved:", *problems]))
