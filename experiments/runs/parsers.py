"""The parsers of all commands with a YAML: jsonargparse's, with short errors."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jsonargparse

from experiments.runs.usage_errors import MOST_LINES, explain


class ShortErrors:
    """Mixed into a parser of jsonargparse: an error ends the program with a message of a few lines, without the usage.

    A ValueError of a settings class, such as "timeout=-1.0 must be greater than 0", is such an error too.
    """

    words: Sequence[str] = ()

    def __init__(self, *args: Any, **named: Any) -> None:
        # An abbreviated flag is refused: --m could mean another setting after the next version of the project.
        super().__init__(*args, **{"allow_abbrev": False} | named)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> jsonargparse.Namespace:
        """As in the base class; remembers the command line for messages."""
        # For a setting inside a group of a class, such as --model.loss.clip_high=null, jsonargparse gives the parsed
        # value to the parser of the class as Python's text of it. There null would be the text "None".
        if not self.exit_on_error and args is not None:
            args = [_with_null(word) for word in args]
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *more, **named)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with a short message. Inner parsers raise, because the outer parser may try another type."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise SystemExit(explain(message, self.words, list(self.get_defaults().keys()), class_settings)) from ex

    def instantiate(self, *args: Any, **named: Any) -> Any:
        """As in the base class, but a ValueError of a settings class ends the program with its message."""
        try:
            return super().instantiate(*args, **named)
        except ValueError as error:
            if not self.exit_on_error:
                raise
            lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
            telling = [line for line in lines if "=" in line and not line.startswith(("Given value", "Subtypes"))]
            raise SystemExit("\n".join((telling or lines)[:MOST_LINES])) from error


class Parser(ShortErrors, jsonargparse.ArgumentParser):
    """The parser of `run_cli`."""


def _with_null(word: str) -> str:
    """A flag, with YAML's null where its value is Python's text of None, or of a list or a mapping with None."""
    flag, _, text = word.partition("=")
    if "None" not in text:
        return word
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a text
        return word
    return word if isinstance(value, str) else f"{flag}={json.dumps(value)}"


def run_cli(component: Callable, args: Sequence[str] | None = None) -> Any:
    """Read the settings of a function or a dataclass from the command line and YAML files; call it with them.

    Args:
        component: the function or the dataclass; its docstring is the help text.
        args: the command line; None means the command line of this process.
    """
    arguments = None if args is None else list(args)
    return jsonargparse.auto_cli(component, as_positional=False, parser_class=Parser, args=arguments)


@functools.cache
def class_settings(path: str) -> tuple[str, ...]:
    """The dotted names of the settings of a class; () if they cannot be found."""
    module, _, name = path.rpartition(".")
    try:
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
        return tuple(parser.get_defaults().keys())
    except Exception:  # the suggestion is optional; the message is complete without it
        return ()
