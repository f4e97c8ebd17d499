"""Common behaviour of all commands: refuse passwords and keys in settings, and print user errors without traceback."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from callbacks.preemption import is_first_process
from datamodules.persistence.credentials import find_credential
from datamodules.persistence.garbage import end_quickly
from datamodules.persistence.progress_lines import lines_in_stage
from datamodules.persistence.user_error import UserError
from experiments.runs.renamed_settings import find_old_flags, find_old_names

T = TypeVar("T")
LARGEST = 2**20  # bytes; a longer file is not a configuration
CURE = (
    "it would be written to config.yaml, logs and W&B. Put the secret into an environment variable and name that "
    "variable: api_key_env for a key, basic_auth_env for user:password"
)


def command(main: Callable[..., T] | None = None, *, failed: str = "") -> Callable[..., Any]:
    """Decorates the `main(args=None)` of an entry point: checks its arguments and configuration files first.

    In a stage of a pipeline, the command prints lines of progress from its first second on.

    A UserError ends the program with its message, and Ctrl-C with a line, without a traceback. Every other exception is
    an error of the code.

    Passwords, keys and old names of settings are refused before anything parses, prints or writes them. The message
    does not repeat a secret.

    Args:
        main: the function.
        failed: the missing result after an error, such as "no comparison"; the message begins with it. Then OSError and
            ValueError are printed as a message too, because such a command only reads files that users may have
            changed.
    """
    if main is None:
        return functools.partial(command, failed=failed)

    told = (UserError, OSError, ValueError) if failed else (UserError,)

    @functools.wraps(main)
    def run(args: Sequence[str] | None = None) -> T:
        refuse_credentials(sys.argv[1:] if args is None else args)
        if args is None:
            end_quickly()
        try:
            with lines_in_stage(is_first_process()):
                return main() if args is None else main(args)
        except told as error:
            sys.exit(f"{failed}: {error}" if failed else str(error))
        except KeyboardInterrupt:
            print("\nstopped by Ctrl-C", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None

    return run


def refuse_credentials(arguments: Sequence[str]) -> None:
    """End the program if an argument, or a YAML or JSON file that an argument names, contains a credential.

    Otherwise, end it if there are old names of settings or class paths; the message lists all of them.
    """
    old: list[str] = []
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        where = name if argument.startswith("--") else f"argument {index + 1}"
        if index and not argument.startswith("--") and arguments[index - 1].startswith("--"):
            where, value = arguments[index - 1].partition("=")[0], argument
        if kind := find_credential(argument):
            sys.exit(f"{find_place(where)} holds {kind}: {CURE}")
        old += [f"{where}: {cure}" for cure in find_old_flags(argument)]
        for file in (Path(text) for text in {argument, value} if text.endswith((".yaml", ".yml", ".json"))):
            old += check_file(file)
    if old:
        sys.exit("\n".join(old))


def find_place(where: str) -> str:
    """The name of an argument for a message; the name is omitted if it is itself the secret."""
    return "an argument" if find_credential(where) else where


def check_file(file: Path) -> list[str]:
    """End the program if a YAML or JSON file contains a credential. Returns its old names, with their positions.

    A missing file is ignored.
    """
    if not file.is_file() or file.stat().st_size > LARGEST:
        return []
    content = file.read_text(errors="replace")
    for number, line in enumerate(content.splitlines(), 1):
        text = line.split(" #")[0]  # comments are not parsed
        if kind := find_credential(text):
            sys.exit(f"{file}, line {number}, holds {kind}: {CURE}")
    return [f"{file}, line {number}: {cure}" for number, cure in find_old_names(content)]
