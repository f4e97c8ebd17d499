"""Hashes of the project's source files that a command uses. With them, a run notices that the code has changed.

A hash covers the syntax tree of a file without docstrings, so comments, docstrings and layout may change. A file counts
if the command imports it, directly or through other files, at the start or later. No git checkout is needed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("datamodules", "lightning_modules", "callbacks", "experiments")
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Code = dict[str, str]  # {"datamodules/samples/boxes.py": 12 hex digits of its hash}


def source_code(modules: Iterable[str], root: Path = ROOT) -> Code:
    """The hashes of these modules (dotted names) and of all modules of the project that they import."""
    found: Code = {}
    waiting = list(modules)
    # Follow the imports from file to file, each file once.
    while waiting:
        for path in _files_of(waiting.pop(), root):
            name = path.relative_to(root).as_posix()
            if name not in found:
                state = path.stat()
                found[name], imports = _read(path, state.st_mtime_ns, state.st_size)
                waiting += imports
    return dict(sorted(found.items()))


def class_modules(settings: Any) -> list[str]:
    """The modules of all classes that a configuration names by `class_path`, at any depth."""
    if isinstance(settings, Mapping):
        own = settings.get("class_path")
        inner = [module for value in settings.values() for module in class_modules(value)]
        return inner + ([own.rpartition(".")[0]] if isinstance(own, str) else [])
    if isinstance(settings, list | tuple):
        return [module for value in settings for module in class_modules(value)]
    return []


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The files that differ between two records, or that only one of them has, in words for a message."""
    changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    added = [f"{name} (new)" for name in sorted(new.keys() - old.keys())]
    return changed + added + [f"{name} (no longer used)" for name in sorted(old.keys() - new.keys())]


def _files_of(module: str, root: Path) -> Iterator[Path]:
    """The file of a module and the __init__.py files of its packages; nothing for a module outside the project."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        yield from (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())


@functools.lru_cache(maxsize=1024)
def _read(path: Path, written: int, size: int) -> tuple[str, tuple[str, ...]]:
    """(hash, imported modules) of a file.

    `written` (time of the last change) and `size` are not used. They are part of the cache's key, so that a changed
    file is read again.
    """
    data = path.read_bytes()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):  # someone is editing the file; importing it will raise the proper error
        return hashlib.sha256(data).hexdigest()[:12], ()
    said = "".join(_shape(tree))
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12], tuple(_imports(tree))


def _imports(tree: ast.AST) -> Iterator[str]:
    """All dotted names that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # the name may be a module itself


def _shape(node: Any) -> Iterator[str]:
    """The syntax tree as text, without docstrings."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, HAS_DOCSTRING) and _is_text(value[:1]):
                value = value[1:]
            if value is not None and value != []:  # newer versions of Python add fields that are empty here
                yield f" {name}="
                yield from _shape(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _shape(item)
        yield "]"
    else:
        yield repr(node)


def _is_text(body: list[ast.stmt]) -> bool:
    """Whether the first statement of a body is a string alone, which is a docstring."""
    expression = body[0].value if body and isinstance(body[0], ast.Expr) else None
    return isinstance(expression, ast.Constant) and isinstance(expression.value, str)
