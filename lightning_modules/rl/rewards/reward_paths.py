"""Load a reward from its class path in a YAML: a class of the project, or a class or function in a user's file."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from datamodules.persistence.credentials import hide_credentials
from datamodules.persistence.problems import Problems, collect_problems

RESERVED = ("total", "failure", "failed", "left_out")  # fields of a completion's record in the rollout log
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_name(name: str) -> bool:
    """Whether a reward may have this name, which is used in logged metrics, records and flags."""
    return _NAME.fullmatch(name) is not None and name not in RESERVED


def build(where: str, class_path: str, init_args: Mapping[str, Any], problems: Problems) -> Callable[[Any], Any]:
    """Load the reward at `class_path`. Problems are added to `problems`; then the returned object must not be called.

    Args:
        where: position of the entry in the settings, for messages.
        class_path: module.Class or module.function.
        init_args: arguments of the class, or further arguments of the function.
        problems: list to which problems are added, each in one sentence with `where` and the class path.
    """
    shown = f"{where}.class_path={class_path!r}"
    with_arguments = f"{shown}, init_args={brief(hide_credentials(str(dict(init_args))))}" if init_args else shown
    # The rewards of the project check their arguments by `Problems`. Without this context, their sentences would go to
    # the list of the whole configuration, without the entry.
    with collect_problems() as faults:
        try:
            reward = _with_arguments(_find(class_path), init_args)
        except _Fault as fault:
            problems.append(f"{shown}: {fault}")
            return _unusable
        except Exception as error:  # the user's constructor runs here, and may raise anything
            faults = faults or [f"its constructor raised {type(error).__name__}: {brief(hide_credentials(str(error)))}"]
    if not faults:
        return reward
    problems.append(f"{with_arguments}: {'; '.join(faults)}")
    return _unusable


def brief(value: Any) -> str:
    """The text of a value in one line of at most 200 characters."""
    return " ".join(str(value)[:1000].split())[:200]


def is_range(stated: Any) -> bool:
    """Whether the `range` of a reward is a pair of numbers, the lower one first."""
    pair = isinstance(stated, tuple | list) and len(stated) == 2
    return pair and all(isinstance(end, Real) for end in stated) and stated[0] < stated[1]


class _Fault(Exception):
    """The class path does not name a reward. The message has the reason and the fix."""


def _unusable(completion: Any) -> float:
    raise ValueError("a reward whose settings cannot work")


def _find(class_path: str) -> Any:
    """The class or function that the path names."""
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        raise _Fault("write module.Class or module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if not f"{module_name}.".startswith(f"{missing}."):  # the module exists but imports something that does not
            raise _Fault(f"{module_name} imports {missing}, which is not installed") from error
        raise _Fault(
            f"there is no module {missing}; put {missing.partition('.')[0]}.py beside the YAML, or into the "
            "working directory"
        ) from error
    except Exception as error:  # the user's file runs here, and may raise anything
        raise _Fault(f"{module_name} cannot be imported: {type(error).__name__}: {brief(error)}") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [each for each in vars(module) if not each.startswith("_")], 1)
        raise _Fault(f"{module_name} has no {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return getattr(module, name)


def _with_arguments(found: Any, init_args: Mapping[str, Any]) -> Callable[[Any], Any]:
    """An object of the class, or the function with its arguments. Raises _Fault, and any error of the constructor."""
    is_class = inspect.isclass(found)
    if not is_class and not callable(found):
        raise _Fault(f"is of type {type(found).__name__}; a reward is a class or a function")
    # The first argument of a function is the completion.
    signature, first = inspect.signature(found), () if is_class else (None,)
    try:
        signature.bind(*first, **init_args)
    except TypeError as error:
        names = list(signature.parameters)[len(first) :]
        raise _Fault(f"{error} (init_args; it takes {', '.join(names) or 'none'})") from error
    reward = found(**init_args) if is_class else partial(found, **init_args) if init_args else found
    # A constructor may set the range, so it is read from the object. A partial does not have its function's attributes.
    stated = getattr(reward if is_class else found, "range", None)
    if stated is not None and not is_range(stated):
        raise _Fault(f"range={stated!r:.60} must be two numbers, the lower one first")
    if stated is not None and reward is not found and not is_class:
        reward.range = stated
    if not callable(reward) and not hasattr(reward, "score_batch"):
        raise _Fault(f"{found.__name__} has neither __call__(completion) nor score_batch(completions)")
    return reward
