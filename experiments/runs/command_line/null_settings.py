"""Settings that are null and must not be. jsonargparse takes null for each setting of a class, whatever its type."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace


def null_problems(name: str, kind: type, settings: Namespace | Mapping[str, Any]) -> list[str]:
    """A message for each setting of an object, and of the dataclasses in it, that is null against its type.

    Args:
        name: of the object, for messages.
        kind: its class, or the base of the class that `class_path` of the settings names.
        settings: the parsed settings.
    """
    values = _plain(settings)
    if "class_path" in values:
        module, _, own = str(values["class_path"]).rpartition(".")
        kind, values = getattr(importlib.import_module(module), own), _plain(values.get("init_args") or {})
        name = kind.__name__ if name == "callback" else name
    return [f"{name}.{dotted}=null: this setting needs a value" for dotted in _wrong_nulls(kind, values)]


def _wrong_nulls(kind: type, values: Mapping[str, Any]) -> Iterator[str]:
    """The dotted names of the settings of a class that are null against its type."""
    hints = _hints(kind)
    for name, value in values.items():
        types = get_args(hints.get(name)) or (hints.get(name),)
        group = next((each for each in types if dataclasses.is_dataclass(each)), None)
        if value is None:
            if name in hints and not {NoneType, Any, object} & {*types}:
                yield name
        elif group is not None and (inner := _plain(value)):
            yield from (f"{name}.{rest}" for rest in _wrong_nulls(group, inner))


def _hints(kind: type) -> dict[str, Any]:
    """The types of the settings of a class, with those that it passes on to its base classes.

    A setting that is null by default may be null, whatever its type says.
    """
    hints: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        maker = each.__dict__.get("__init__")
        if maker is None or each is object:
            continue
        try:
            found = get_type_hints(maker)
        except NameError:  # a type that is imported for type checkers alone
            continue
        parameters = inspect.signature(maker).parameters
        optional = {name for name, parameter in parameters.items() if parameter.default is None}
        own = {name: found[name] for name in parameters if name in found}
        hints |= {name: hint | None if name in optional else hint for name, hint in own.items()}
    return hints


def _plain(value: Any) -> dict[str, Any]:
    """A group of settings as a dict of its own names; {} for any other value."""
    return dict(vars(value)) if isinstance(value, Namespace) else dict(value) if isinstance(value, Mapping) else {}
