"""The source files of the project that a command uses, and their hashes: so a run notices that the code has changed.

The hash is of a file's syntax tree without docstrings: comments, docstrings and layout may change. A file counts if the
command imports it, directly or through other files, at the start or later. No git checkout is needed.
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
    """Hashes of these modules (dotted names) and of all modules of the project that they import."""
    found: Code = {}
    waiting = list(modules)
    while waiting:
        for path in _files_of(waiting.pop(), root):
            name = path.relative_to(root).as_posix()
            if name not in found:
                state = path.stat()
                found[name], imports = _read(path, state.st_mtime_ns, state.st_size)
                waiting += imports
    return dict(sorted(found.items()))


def class_modules(settings: Any) -> list[str]:
    """The modules of the classes that a configuration names by `class_path`, in its callbacks, model and others."""
    if isinstance(settings, Mapping):
        own = settings.get("class_path")
        inner = [module for value in settings.values() for module in class_modules(value)]
        return inner + ([own.rpartition(".")[0]] if isinstance(own, str) else [])
    if isinstance(settings, list | tuple):
        return [module for value in settings for module in class_modules(value)]
    return []


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Files that differ or that only one of the two has, in words for a message."""
    changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    added = [f"{name} (new)" for name in sorted(new.keys() - old.keys())]
    return changed + added + [f"{name} (no longer used)" for name in sorted(old.keys() - new.keys())]


def _files_of(module: str, root: Path) -> Iterator[Path]:
    """The module's file and those of the packages that it lies in; none for a module that is not the project's."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        yield from (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())


@functools.lru_cache(maxsize=1024)
def _read(path: Path, written: int, size: int) -> tuple[str, tuple[str, ...]]:
    """(hash, imported modules); `written` and `size` change when the file does."""
    data = path.read_bytes()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):  # it is being edited: what imports it fails by itself
        return hashlib.sha256(data).hexdigest()[:12], ()
    said = "".join(_shape(tree))
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12], tuple(_imports(tree))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _shape(node: Any) -> Iterator[str]:
    """The tree as text. Empty fields are left out: later versions of Python add some."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, HAS_DOCSTRING) and _is_text(value[:1]):
                value = value[1:]
            if value is not None and value != []:
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
    expression = body[0].value if body and isinstance(body[0], ast.Expr) else None
    return isinstance(expression, ast.Constant) and isinstance(expression.value, str)
