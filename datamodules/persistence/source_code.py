"""Hashes of the source files that a command uses. With them, a run notices that the code has changed.

The files are the project's, and the user's own files that a configuration names (a reward, a callback), with the
modules that they import. Installed packages are not read.

A hash covers the syntax tree of a file without docstrings, so comments, docstrings and layout may change. A file counts
if the command imports it, directly or through other files, at the start or later, or if a file names a class of it by
`class_path`. No git checkout is needed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("datamodules", "lightning_modules", "callbacks", "experiments")
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Code = dict[str, str]  # {"datamodules/samples/boxes.py": 12 hex digits of its hash}


def source_code(modules: Iterable[str], root: Path = ROOT) -> Code:
    """The hashes of these modules (dotted names) and of all modules that they import, except installed packages.

    The name of a user's file is its path below the folder in which Python finds it.
    """
    found: Code = {}
    waiting = list(modules)
    homes: dict[str, Path | None] = dict.fromkeys(PACKAGES, root)
    # Follow the imports from file to file, each module once: most modules are imported many times.
    seen: set[str] = set()
    while waiting:
        if (module := waiting.pop()) in seen:
            continue
        seen.add(module)
        parts = module.split(".")
        if parts[0] not in homes:
            homes[parts[0]] = _home_of(parts[0])
        for path in _files_of(parts, homes[parts[0]]):
            name = path.relative_to(homes[parts[0]]).as_posix()
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


def users_files(code: Mapping[str, str]) -> Code:
    """The files of a record that do not belong to the project."""
    return {name: content for name, content in code.items() if name.partition("/")[0] not in PACKAGES}


def _home_of(package: str) -> Path | None:
    """The folder that holds a user's module or package; None for an installed module, and if there is no module."""
    spec = PathFinder.find_spec(package) if package else None
    places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin]
    home = Path(places[0]).resolve().parent if places and places[0] else None
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    if home is None or standard in (home, *home.parents) or {"site-packages", "dist-packages"} & set(home.parts):
        return None
    return home


def _files_of(parts: list[str], home: Path | None) -> Iterator[Path]:
    """The file of a module and the __init__.py files of its packages below `home`; nothing without a home."""
    for depth in range(1, len(parts) + 1) if home is not None else ():
        base = home.joinpath(*parts[:depth])
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
    text = "".join(_shape(tree))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12], tuple(_imports(tree))


def _imports(tree: ast.AST) -> Iterator[str]:
    """All dotted names that a file imports, also inside functions, and the modules of classes that it names by
    `class_path`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # the name may be a module itself
        elif isinstance(node, ast.Dict):  # a default that is loaded by its path, such as GRPO's rewards
            yield from class_modules({"class_path": _text_of(node, "class_path")})


def _text_of(node: ast.Dict, name: str) -> str | None:
    """The text at this key of a dict that is written in a file."""
    values = [value for key, value in zip(node.keys, node.values, strict=True) if _constant(key) == name]
    return _constant(values[-1]) if values else None


def _constant(node: ast.expr | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


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
    """Whether the first statement of a body is a docstring."""
    expression = body[0].value if body and isinstance(body[0], ast.Expr) else None
    return isinstance(expression, ast.Constant) and isinstance(expression.value, str)
