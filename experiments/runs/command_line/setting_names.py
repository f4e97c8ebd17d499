"""The names of a training's settings, read from source files: a wrong name is told within a second.

The parser of the command knows all names, but it needs the classes, and so torch and Lightning, which take several
seconds. Here the classes are not imported. Only names that no class has are told; where a class cannot be read, the
parser decides.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from datamodules.persistence.source_code import PACKAGES, ROOT
from experiments.runs.command_line.run_words import config_files, last_given
from experiments.runs.run_identity import STARTED
from experiments.runs.usage_errors import MOST_CHARACTERS, MOST_LINES, suggest

# {"loss": {"kl_beta": None}, "seed": None}: a group has names, a value or an unknown type has None.
Names = Mapping[str, Any]
DATA = "datamodules.multi_image.MultiImageData"
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
RUN = ("config", "seed_everything", "experiment", "phase", "outputs", "log_to", "trainer", "model", "data")
ALWAYS = ("help", "print_config", "class_path", "init_args", "<<")
# Settings that always have the value of another one: {setting: the one to give}. `train_cli` makes the links from this
# table. The parser would overwrite a value for the first one, inside init_args without a word.
LINKED = {
    "data.seed": "seed_everything",
    "model.seed": "seed_everything",
    "data.processor": "model.model",
    "model.box_format": "data.box_format",
}


def refuse_unknown(words: Sequence[str]) -> None:
    """End the program with the settings of the command line and its YAML files that do not exist or are linked."""
    configs = config_files(words)
    if missing := [file for file in configs if file.suffix in (".yaml", ".yml") and not file.is_file()]:
        raise SystemExit("\n".join(f"--config={file} does not exist" for file in missing[:MOST_LINES]))
    # A run's own config.yaml may be of another version of the project: the command tells that, and how to go on.
    given = [file for file in configs if not (file.parent / STARTED).is_file()]
    files = [(file, node) for file in given if (node := _compose(file)) is not None]
    # The class of `model` is known if a file or a flag names it; its settings may stand in other files.
    paths = [path for _, node in files if (path := _class_path(_member(node, "model")))]
    path = last_given(words, "model", "model.class_path") or (paths[-1] if paths else "")
    names = dict.fromkeys(RUN) | {"model": class_names(path)}
    names |= {"data": class_names(DATA), "trainer": class_names(TRAINER)}
    known = [name for name in _dotted(names) if name not in LINKED]
    faults = [*_linked_flags(words)]
    faults += [fault for word in words if not _is_linked(word) and (fault := _flag_fault(word, names, known))]
    for file, node in files:
        faults += _linked_nodes(node, "", str(file))
        faults += _node_faults(node, names, "", str(file), known)
        callbacks = _member(_member(node, "trainer"), "callbacks")
        for entry in callbacks.value if isinstance(callbacks, yaml.SequenceNode) else []:
            faults += _callback_faults(entry, str(file))
    if faults:
        raise SystemExit("\n".join(faults[:MOST_LINES]))


@functools.cache
def class_names(path: str) -> Names | None:
    """The settings of a class, with those of its groups; None if the source files do not show all of them."""
    module, _, name = path.rpartition(".")
    tree = _read(module)
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name] if tree else []
    if not found:
        return None
    (node,) = found
    if _is_dataclass(node):
        own = [(item.target.id, item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
        return _with_bases(node, module, own, node.bases)
    makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if not makers:  # the class of its base, if there is but one
        return class_names(_resolve(node.bases[0], module)) if len(node.bases) == 1 else None
    arguments = makers[0].args
    own = [(each.arg, each.annotation) for each in (*arguments.args[1:], *arguments.kwonlyargs)]
    if arguments.vararg or (arguments.kwarg and not _only_for_base(makers[0], arguments.kwarg.arg)):
        return None
    return _with_bases(node, module, own, node.bases if arguments.kwarg else [])


def _with_bases(
    node: ast.ClassDef, module: str, own: Sequence[tuple[str, ast.expr | None]], bases: Sequence[ast.expr]
) -> Names | None:
    """The settings `own` and those of the classes `bases`; None if one of these cannot be read."""
    names: dict[str, Any] = {}
    for base in bases:
        inherited = class_names(_resolve(base, module))
        if inherited is None:
            return None
        names |= inherited
    return names | {name: _group(annotation, module) for name, annotation in own}


def _group(annotation: ast.expr | None, module: str) -> Names | None:
    """The settings of the dataclass that is the one type of an annotation; None for any other annotation."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        sides = [side for side in (annotation.left, annotation.right) if ast.unparse(side) != "None"]
        annotation = sides[0] if len(sides) == 1 else None
    if not isinstance(annotation, ast.Name):
        return None
    path = _resolve(annotation, module)
    tree = _read(path.rpartition(".")[0])
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef)] if tree else []
    return class_names(path) if any(n.name == annotation.id and _is_dataclass(n) for n in nodes) else None


def _resolve(node: ast.expr, module: str) -> str:
    """The dotted path of the class that a file calls so: imported, or its own."""
    name = ast.unparse(node)
    for item in (_read(module) or ast.Module([], [])).body:
        if isinstance(item, ast.ImportFrom) and item.module:
            for alias in item.names:
                if (alias.asname or alias.name) == name:
                    return f"{item.module}.{alias.name}"
    return f"{module}.{name}"


@functools.cache
def _read(module: str) -> ast.Module | None:
    """The syntax tree of a module of the project, or of Lightning's Trainer; None for any other."""
    first, _, rest = module.partition(".")
    if first in PACKAGES:
        file = ROOT / f"{module.replace('.', '/')}.py"
    elif module == TRAINER.rpartition(".")[0] and (spec := importlib.util.find_spec(first)):
        file = Path(spec.submodule_search_locations[0], f"{rest.replace('.', '/')}.py")  # found without importing it
    else:
        return None
    return ast.parse(file.read_text()) if file.is_file() else None


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _only_for_base(maker: ast.FunctionDef, name: str) -> bool:
    """Whether `**name` is passed on to `super().__init__` and used nowhere else."""
    uses = [node for node in ast.walk(maker) if isinstance(node, ast.Name) and node.id == name]
    calls = [node for node in ast.walk(maker) if isinstance(node, ast.Call)]
    passed = [call for call in calls if any(k.arg is None and ast.unparse(k.value) == name for k in call.keywords)]
    return len(uses) == 1 and [ast.unparse(call.func) for call in passed] == ["super().__init__"]


def _linked_flags(words: Sequence[str]) -> Iterator[str]:
    """A message for each setting that a flag gives although it has the value of another setting.

    A flag may give a whole group, as a mapping or as a YAML file: --data='{"seed": 5}'.
    """
    for word, after in pairwise([*words, ""]):
        flag, is_one_word, value = word.partition("=")
        name, value = _setting(flag), value if is_one_word else after
        if _is_linked(word):
            yield _linked(f"--{name}={value[:MOST_CHARACTERS]}", LINKED[name])
        elif name.partition(".")[0] in ("model", "data"):
            is_file = value.endswith((".yaml", ".yml"))
            node = _compose(Path(value) if is_file else value) if is_file or value.startswith("{") else None
            yield from _linked_nodes(node, name, value if is_file else flag)


def _linked_nodes(node: yaml.Node | None, path: str, place: str) -> Iterator[str]:
    """The same for a part of a YAML. `path` is its dotted name, `place` its file or its flag."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = str(key.value)
        dotted = path if name in ("init_args", "<<") else f"{path}.{name}".lstrip(".")
        if dotted in LINKED:
            shown = f"{dotted}={value.value[:MOST_CHARACTERS]}" if isinstance(value, yaml.ScalarNode) else dotted
            where = place if place.startswith("--") else f"{place}, line {key.start_mark.line + 1}"
            yield _linked(f"{where}: {shown}", LINKED[dotted])
        else:
            yield from _linked_nodes(value, dotted, place)


def _linked(shown: str, source: str) -> str:
    return f"{shown}: this setting always has the value of {source}. Give {source} instead"


def _is_linked(word: str) -> bool:
    """Whether a word is the flag of a setting that has the value of another one."""
    return word.startswith("--") and _setting(word.partition("=")[0]) in LINKED


def _setting(flag: str) -> str:
    """The dotted name of the setting of a flag, without init_args; "" if the word is no flag."""
    parts = flag[2:].removesuffix("+").split(".") if flag.startswith("--") else []
    return ".".join(part for part in parts if part != "init_args")


def _flag_fault(word: str, names: Names, known: Sequence[str]) -> str | None:
    """What is wrong with the name of a flag, if anything."""
    flag, is_one_word, value = word.partition("=")
    if not flag.startswith("--"):
        return None
    parts = _setting(flag).split(".")
    for part in parts:
        if part in ALWAYS or names is None:
            return None
        if part not in names:
            shown = f"{flag.replace('.init_args', '')}{is_one_word}{value[:MOST_CHARACTERS]}"
            return f"{shown}: no such setting{suggest('.'.join(parts), known) or '; --help lists all'}"
        names = names[part]
    return None


def _node_faults(
    node: yaml.Node, names: Names, path: str, file: str, known: Sequence[str], owner: str = ""
) -> Iterator[str]:
    """What is wrong with the names in a part of a YAML file.

    Args:
        node: the part.
        names: the settings that it may have.
        path: the dotted name of the part.
        file: for messages.
        known: the dotted names of all settings, for suggestions.
        owner: the class that has the settings, for messages; "" for the run.
    """
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = str(key.value)
        dotted = f"{path}.{name}".lstrip(".")
        if name == "init_args":
            yield from _node_faults(value, names, path, file, known, owner)
        elif name in ALWAYS or names is None or dotted in LINKED:
            continue
        elif name not in names:
            shown = f"{dotted}={value.value[:MOST_CHARACTERS]}" if isinstance(value, yaml.ScalarNode) else dotted
            cure = suggest(dotted, known)
            what = f"{owner} has no such setting" if owner else "no such setting"
            yield f"{file}, line {key.start_mark.line + 1}: {shown}: {what}{cure}"
        elif names[name] is not None:
            yield from _node_faults(value, names[name], dotted, file, known, owner)


def _callback_faults(entry: yaml.Node, file: str) -> Iterator[str]:
    """What is wrong with the names of a callback's settings."""
    path = _class_path(entry)
    if names := class_names(path):
        yield from _node_faults(entry, names, "", file, list(_dotted(names)), path.rpartition(".")[2])


def _dotted(names: Names, prefix: str = "") -> Iterator[str]:
    """All dotted names."""
    for name, group in names.items():
        yield f"{prefix}{name}"
        if group:
            yield from _dotted(group, f"{prefix}{name}.")


def _compose(source: Path | str) -> yaml.Node | None:
    """The nodes of a YAML file, or of a text; None for what is no YAML, which the parser tells."""
    try:
        return yaml.compose(source if isinstance(source, str) else source.read_text(), Loader=yaml.SafeLoader)
    except (ValueError, OSError, yaml.YAMLError):
        return None


def _member(node: yaml.Node | None, name: str) -> yaml.Node | None:
    """The value of a key in a mapping; None without it."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def _class_path(node: yaml.Node | None) -> str:
    value = _member(node, "class_path")
    return str(value.value) if isinstance(value, yaml.ScalarNode) else ""
