"""Parse command lines by the commands' own parsers, without running them. A program of its own for `test_docs.py`.

It reads JSON from standard input, imports each entry point once, and stops every command as soon as it has parsed.

Input: {"commands": [[module, [words]], ...], "names": ["callbacks.previews.Previews", ...]}
Output: the same lists with the fault of each, or null.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jsonargparse

from tests.documents import is_placeholder

NANO = "experiments/configs/nano"


class Parsed(BaseException):
    """The command has parsed its arguments. No command catches it."""


def stop_after(kind: type) -> None:
    """Let `kind.parse_args` raise Parsed where it would return. A flag with a placeholder is only looked up."""
    original = kind.parse_args

    def parse_args(self, args=None, *more, **options):
        words, flags = without_placeholders(sys.argv[1:] if args is None else list(args))
        known = self._option_string_actions
        for flag in flags:
            if flag not in known and flag.split(".")[0] not in known:  # fields of a class are not listed one by one
                self.error(f"unknown flag {flag}")
        original(self, words, *more, **options)
        raise Parsed

    kind.parse_args = parse_args


def without_placeholders(words: list[str]) -> tuple[list[str], list[str]]:
    """The words without flags that have a placeholder as value, and those flags."""
    kept, dropped, position = [], [], 0
    while position < len(words):
        word = words[position]
        flag, joined, value = word.partition("=")
        apart = not joined and position + 1 < len(words) and not words[position + 1].startswith("--")
        value = words[position + 1] if apart else value
        if word.startswith("--") and is_placeholder(value):
            dropped.append(flag)
            position += 1 + apart
        else:
            kept.append(word)
            position += 1
    return kept, dropped


def parse(module: str, words: list[str]) -> str | None:
    """The fault of a command, or None if its own parser takes it."""
    sys.argv = [module, *words]
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            entry = importlib.import_module(module).main
            entry() if module == "experiments.nano.pretrain" else entry(words)
    except Parsed:
        return None
    except SystemExit as end:
        if end.code in (0, None):  # --help
            return None
        return f"{end.code if isinstance(end.code, str) else said.getvalue().strip().splitlines()[-1:]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it has run, without parsing its arguments"


def overridden(module: str, words: list[str]) -> list[tuple[str, list[str]]]:
    """The commands that are inside a command: `--overrides.<stage>="flags"` of the pipeline and of ablations."""
    found = []
    for word in words:
        flag, _, value = word.partition("=")
        if flag.startswith("--overrides."):
            stage = flag.removeprefix("--overrides.")
            config = Path(NANO, "grpo.yaml" if stage.startswith("grpo") else f"{stage}.yaml")
            entry = ("experiments.evaluate", f"{NANO}/eval.yaml") if stage == "evaluation" else None
            name, file = entry or ("experiments.train", str(config))
            found.append((name, ["--config", file, *shlex.split(value)]))
    return found


def resolve(name: str) -> str | None:
    """The fault of a dotted name, or None if it is a module, or something in one."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError as error:
            if error.name and not ".".join(parts[:depth]).startswith(error.name):
                return f"{name}: {error}"
            continue
        for part in parts[depth:]:
            if not hasattr(found, part):
                return f"{name}: {found.__name__} has no {part}"
            found = getattr(found, part)
        return None
    return f"{name}: no such module"


def main() -> None:
    asked = json.load(sys.stdin)
    for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        stop_after(kind)
    verdicts = []
    for module, words in asked["commands"]:
        faults = [parse(name, list(more)) for name, more in [(module, words), *overridden(module, words)]]
        verdicts.append(next((fault for fault in faults if fault), None))
    print(json.dumps({"commands": verdicts, "names": [resolve(name) for name in asked["names"]]}))


if __name__ == "__main__":
    main()
