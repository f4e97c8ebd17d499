"""Errors of a command line or a YAML as short messages: the setting, its value, its position, and a suggestion.

jsonargparse describes an error as a tree of everything that it has tried, below all options of the command. `explain`
finds the branch that the user meant. This file needs only the standard library.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

MOST_CHARACTERS = 80  # largest length of a value in a message
MOST_LINES = 5
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
# Fields of a phase. A pipeline takes them only for one of its stages.
PHASE_FIELDS = ("trainer", "model", "data")

_KEY = re.compile(r'^Parser key "([^"]+)":\s*(.*)')
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':")
_UNKNOWN = re.compile(r"^(?:Group '([^']+)' does not accept option|Option|Key) '?([\w.]+)'?( is not accepted|$)?")
_TYPE = re.compile(r"^Expected an? (.+?)(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"^Given value: (.*)$")
_NESTED = re.compile(r"NestedArg\(key='([^']*)', val=(.*)\)$")
_UNKNOWN_OF_CLASS = re.compile(
    r'Parser key "([^"]+)":.*class_path \'([^\']+)\':\s*unrecognized arguments: ([^\n]*)', re.DOTALL
)
_NO_CLASS = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_NO_MODULE = re.compile(r"No module named '([^']+)'")


@dataclass(frozen=True)
class Leaf:
    """One line of jsonargparse's tree that says what is wrong. `depth` is its indentation."""

    depth: int
    text: str
    path: str  # dotted name of the setting, as far as the tree names it
    owner: str | None  # class path of the object that has the setting


def explain(
    message: str,
    words: Sequence[str] = (),
    known: Collection[str] = (),
    class_settings: Callable[[str], Collection[str]] = lambda path: (),
) -> str:
    """A parser's error in at most `MOST_LINES` lines.

    Args:
        message: the message of argparse or jsonargparse.
        words: the command line.
        known: dotted names of the command's settings.
        class_settings: dotted names of the settings of a class path.
    """
    flags = [name.replace("--", "", 1) for name in known]
    # An unknown flag of a class is inside the tree, without the name of the setting that holds the class.
    if found := _UNKNOWN_OF_CLASS.search(message):
        key, path, rest = found.groups()
        settings = [f"{key}.{name}" for name in class_settings(path)]
        return _explain_unrecognized([f"--{key}.{word.lstrip('-')}" for word in rest.split()], settings)
    if found := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _explain_unrecognized(found[1].split(), flags)
    if found := re.search(r"the following arguments are required: (.*)", message):
        names = ", ".join(name.strip().removeprefix("--") for name in found[1].split(","))
        cure = (
            "Give a YAML with --config, or each as --name=value" if "config" in flags else "Give each as --name=value"
        )
        return f"no value for: {names}. {cure}"
    if found := re.search(r"Problems parsing config: (.*)", message, re.DOTALL):
        return _explain_yaml(found[1], words)
    leaves, value = _read_tree(message)
    if not leaves:
        return _shorten(message)
    return _explain_leaves(leaves, value, words, flags, class_settings)


def suggest(word: str, known: Collection[str]) -> str:
    """ "; did you mean X?" for the known dotted name that is nearest to `word`; "" if none is near."""
    if near := difflib.get_close_matches(word, known, 1, 0.75):
        return f"; did you mean {near[0]}?"
    # Compare only the last part: model.beta for loss.kl_beta.
    ends = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(word.rpartition(".")[2], ends, 1, 0.6)
    return f"; did you mean {ends[near[0]]}?" if near else ""


def _explain_unrecognized(words: Sequence[str], known: Collection[str]) -> str:
    """Each unknown flag with a suggestion."""
    lines = []
    for word in words[: MOST_LINES - 1]:
        name = word.partition("=")[0].lstrip("-")
        if not word.startswith("-"):
            if not lines:
                lines.append(f"{word}: a value without a flag; settings are given as --name=value")
        elif "overrides" in known and name.partition(".")[0] in PHASE_FIELDS:
            cure = f'give it to one stage, such as --overrides.grpo="{word}"'
            lines.append(f"{word}: not a setting of this command, but of its stages; {cure}")
        else:
            lines.append(f"{word}: no such setting{suggest(name, known) or '; --help lists all'}")
    return "\n".join(lines)


def _explain_yaml(text: str, words: Sequence[str]) -> str:
    line = re.findall(r"line (\d+)", text)
    what = text.strip().splitlines()[0].removeprefix("while ")
    where = ", ".join(map(str, _files(words))) or "the configuration"
    return f"{where} is no valid YAML: {what}{f', line {line[-1]}' if line else ''}"


def _read_tree(message: str) -> tuple[list[Leaf], str | None]:
    """The leaves of jsonargparse's tree, and the innermost value that it repeats."""
    leaves: list[Leaf] = []
    stack: list[tuple[int, str, str]] = []  # (indentation, "key" or "class", name)
    value, value_depth = None, -1
    for line in message.splitlines():
        if not line.strip():
            continue
        text = line.strip().removeprefix("- ")
        depth = len(line) - len(line.lstrip())
        stack = [part for part in stack if part[0] < depth]
        if found := _KEY.match(text):
            stack.append((depth, "key", found[1]))
            depth, text = depth + 1, found[2]
        elif found := _CLASS.match(text):
            stack.append((depth, "class", found[1]))
            continue
        if (found := _GIVEN.match(text)) and depth > value_depth:
            value, value_depth = found[1], depth
            if nested := _NESTED.search(value):
                value = nested[2].strip("'\"")
        if not text or text.endswith(":") or re.match(r"(Subtypes|Given value|Does not validate|a (class|dict))", text):
            continue
        if found := re.match(r"Expected .*Got value: (.*)", text):
            value, value_depth = found[1], 10**6
        path = ".".join(name for _, kind, name in stack if kind == "key")
        owners = [name for _, kind, name in stack if kind == "class"]
        leaves.append(Leaf(depth, text, path, owners[-1] if owners else None))
    return leaves, value


def _explain_leaves(
    leaves: Sequence[Leaf],
    value: str | None,
    words: Sequence[str],
    known: Collection[str],
    class_settings: Callable[[str], Collection[str]],
) -> str:
    deepest = max(leaf.depth for leaf in leaves)
    # 1. A setting or a class that does not exist.
    for leaf in leaves:
        if found := _UNKNOWN.match(leaf.text):
            name = ".".join(filter(None, (leaf.path, found[1], found[2]))) + _given(found[2], words)
            known_as = name.partition("=")[0]
            if leaf.owner is None:
                return f"{_where(found[2], words)}{name}: no such setting{suggest(known_as, known)}"
            settings = [f"{leaf.path}.{each}" for each in class_settings(leaf.owner)]
            cure = suggest(known_as, settings) or f"; it has {_listed([s.rpartition('.')[2] for s in settings])}"
            kind = leaf.owner.rpartition(".")[2]
            return f"{_where(found[2], words)}{name}: {kind} has no such setting{cure}"
        if (found := _NO_CLASS.search(leaf.text)) or (found := _NO_MODULE.search(leaf.text)):
            return _explain_class(leaf, found, words)
    # 2. A value of a wrong type. Several types may be allowed; null is named only if nothing else is.
    last = [leaf for leaf in leaves if leaf.depth == deepest]
    types = [found[1] for leaf in last if (found := _TYPE.match(leaf.text))]
    if types:
        path = last[0].path
        shown = repr(value[:MOST_CHARACTERS]) if value is not None else "this value"
        allowed = [_type_words(kind) for kind in types if "NoneType" not in kind or len(types) == 1]
        choices = [choice for kind in types for choice in re.findall(r"'([^']+)'", kind) if "Literal" in kind]
        cure = suggest(value or "", choices) if choices else ""
        return f"{_where(path.rpartition('.')[2], words)}{path}={shown} must be {' or '.join(allowed)}{cure}"
    # 3. Anything else, such as a file that does not exist.
    return (
        f"{last[0].path}: {_shorten(last[0].text)}"
        if last[0].path
        else _shorten("\n".join(leaf.text for leaf in leaves))
    )


def _explain_class(leaf: Leaf, found: re.Match, words: Sequence[str]) -> str:
    """A class path that does not exist, with the nearest class of its module, or the missing package of its module."""
    path = leaf.owner or ".".join(filter(None, found.groups()))
    place = f"{_where(re.escape(path), words, value=True)}{leaf.path or 'class_path'}"
    if found.re is _NO_MODULE and not path.startswith(found[1].split(".")[0]):
        return f"{place}: {path} needs the package {found[1]}, which is not installed"
    cure = ""
    if found.re is _NO_CLASS:
        module = importlib.import_module(found[1])
        near = difflib.get_close_matches(found[2], dir(module), 1)
        cure = f"; did you mean {found[1]}.{near[0]}?" if near else ""
    return f"{place}: there is no class {path}{cure}"


def _type_words(kind: str) -> str:
    """ "<class 'int'>" or "typing.Literal['a', 'b']" in words."""
    if found := re.match(r"<class '([\w.]+)'>", kind):
        return WORDS.get(found[1], found[1].rpartition(".")[2])
    if kind.startswith("dot import path"):
        return "a group of settings"
    if found := re.match(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return f"one of {found[1]}"
    return _shorten(kind)


def _files(words: Sequence[str]) -> list[Path]:
    """The YAML files that a command line names."""
    named = [Path(word.partition("=")[2] or word) for word in words if word.endswith((".yaml", ".yml"))]
    return [file for file in named if file.is_file()]


def _given(name: str, words: Sequence[str]) -> str:
    """ "=value" as a flag or a YAML gives it to the setting whose name ends in `name`; "" if none does."""
    for word, after in pairwise([*words, ""]):
        flag, is_one_word, value = word.partition("=")
        if word.startswith("--") and flag.rpartition(".")[2].lstrip("-") == name:
            return f"={(value if is_one_word else after)[:MOST_CHARACTERS]}"
    for file in _files(words):
        if found := re.search(rf"(?m)(?:^|[\s{{,]){name}\s*:[ \t]*([^\n,}}#]*)", file.read_text(errors="replace")):
            return f"={found[1].strip()[:MOST_CHARACTERS]}" if found[1].strip() else ""
    return ""


def _where(name: str, words: Sequence[str], value: bool = False) -> str:
    """ "file.yaml, line 3: " if a YAML of the command line has this name as a key, and no flag has it; else ""."""
    flags = [word.partition("=")[0].rpartition(".")[2].lstrip("-") for word in words if word.startswith("--")]
    if name in flags:
        return ""
    pattern = re.compile(name if value else rf"(?:^|[\s{{,]){name}\s*:")
    for file in _files(words):
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line.split(" #")[0]):
                return f"{file}, line {number}: "
    return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _shorten(text: str) -> str:
    """At most `MOST_LINES` lines of at most 300 characters."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return "\n".join(line if len(line) <= 300 else line[:297] + "..." for line in lines[:MOST_LINES])


class PlainParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are short. It refuses abbreviated flags."""

    words: Sequence[str] = ()

    def __init__(self, **named: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | named)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As in the base class; remembers the command line for messages."""
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with a short message. Unknown flags are told before absent ones, which they may stand for."""
        flags = [name for action in self._actions for name in action.option_strings]
        if unknown := [word for word in self.words if word.startswith("--") and word.partition("=")[0] not in flags]:
            message = f"unrecognized arguments: {' '.join(unknown)}"
        raise SystemExit(explain(message, known=flags))
