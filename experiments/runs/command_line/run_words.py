"""What a training's command line says in one word and the run needs in several: its seed, its GPUs, its first model.

Words are completed from the YAML files alone, before anything that takes long is imported. The completed words are
settings of the run, so the saved configuration and the processes of other ranks have them too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from datamodules.persistence.source_code import class_modules
from datamodules.persistence.user_error import UserError
from datamodules.streaming.shard_sources import source_list

MODEL_FLAGS = ("model.init_args.model", "model.model")
# The numbers whose product is the total batch of an update, with their values where neither YAML nor flag has one.
BATCH = {"data.batch_size": 8, "trainer.devices": 1, "model.accumulate": 1, "trainer.num_nodes": 1}

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.[A-Z]\w*")


class WordsError(UserError, ValueError):
    """Words of a command line that cannot be completed; the message has the value and the cure."""


def complete_words(words: Sequence[str]) -> list[str]:
    """The command line of `experiments.train` with --seed, --gpus and the model of an earlier phase as settings."""
    words, seed = take_number(words, "--seed", least=0)
    words, gpus = take_number(words, "--gpus", least=1)
    settings = read_yamls(words)
    # 1. The same folder as the pipeline's at this seed.
    before = settings.get("experiment")
    experiment = last_given(words, "experiment") or before  # wherever the flag stands: it is repeated at the end
    if seed is not None:
        experiment = seeded(str(experiment), seed)
        words += [f"--seed_everything={seed}", f"--experiment={experiment}"]
    # 2. The phases of an experiment belong together.
    words += _linked_model(words, settings, (str(before), str(experiment)))
    # 3. The total batch of an update stays.
    return words + (gpu_words(words, settings, gpus) if gpus else [])


def seeded(experiment: str, seed: int) -> str:
    """The name of an experiment at this seed."""
    return experiment if seed == 0 else f"{experiment}-seed{seed}"


def take_value(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """The words without `flag` and its value, and the last value given."""
    rest, found, waiting = [], None, list(words)
    while waiting:
        name, is_one_word, value = waiting[0].partition("=")
        if name != flag:
            rest.append(waiting.pop(0))
            continue
        found = value if is_one_word else (waiting[1] if len(waiting) > 1 else "")
        del waiting[: 1 if is_one_word else 2]
    return rest, found


def take_number(words: Sequence[str], flag: str, least: int) -> tuple[list[str], int | None]:
    """The words without `flag` and its value, and the last value given. Raises WordsError if that is no number."""
    rest, found = take_value(words, flag)
    if found is not None and (not found.isdigit() or int(found) < least):
        raise WordsError(f"{flag}={found!r} must be a whole number, at least {least}")
    return rest, None if found is None else int(found)


def read_paths(text: str) -> list[str]:
    """The paths of a flag's value, such as "[data/nano,models/base]"."""
    return [path.strip() for path in text.strip("[]").split(",") if path.strip()]


def read_yamls(words: Sequence[str]) -> dict[str, Any]:
    """The settings of the YAML files behind --config, later files over earlier ones; {} where one cannot be read.

    The parser of the command reports the fault of a file.
    """
    settings: dict[str, Any] = {}
    for file in config_files(words):
        try:
            settings = laid_over(settings, yaml.safe_load(file.read_text()) or {})
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return {}
    return settings


def yaml_fault(file: Path) -> str | None:
    """Why a file holds no settings by name; None if it does."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        return f"line {mark.line + 1}: {error.problem}" if mark else str(error).splitlines()[0]
    return None if isinstance(settings, Mapping) else f"expected names and values, found {settings!r:.60}"


def config_files(words: Sequence[str]) -> list[Path]:
    """The existing files behind --config, in the order of the command line."""
    named = []
    for word, after in pairwise([*words, ""]):
        name, is_one_word, value = word.partition("=")
        named += [value if is_one_word else after] if name == "--config" else []
    return [Path(name) for name in named if Path(name).is_file()]


def last_given(words: Sequence[str], *names: str) -> str | None:
    """The last value that a flag of one of these names has; None without one."""
    found = None
    for word, after in pairwise([*words, ""]):
        name, is_one_word, value = word.partition("=")
        if name.removeprefix("--") in names and name.startswith("--"):
            found = value if is_one_word else after
    return found


def gpu_words(words: Sequence[str], settings: Mapping[str, Any], gpus: int) -> list[str]:
    """The settings by which this number of GPUs makes the same total batch. They are printed.

    Raises WordsError if the total batch cannot be divided so.
    """
    if given := [name for name in ("trainer.devices", "trainer.accelerator") if last_given(words, name) is not None]:
        raise WordsError(f"--gpus={gpus} and --{given[0]} exclude each other: give one of them")
    values = [setting_given(words, settings, name) or default for name, default in BATCH.items()]
    if not all(str(value).isdigit() and int(value) > 0 for value in values):
        shown = ", ".join(f"{name}={value}" for name, value in zip(BATCH, values, strict=True))
        raise WordsError(f"--gpus={gpus}: the total batch is not known from {shown}. Give numbers above 0")
    batch, devices, accumulate, nodes = map(int, values)
    total = batch * devices * accumulate * nodes
    share = total // (gpus * nodes)  # samples of one update on one GPU
    if total % (gpus * nodes):
        fitting = [str(number) for number in range(1, total // nodes + 1) if total % (number * nodes) == 0]
        raise WordsError(
            f"--gpus={gpus}: the total batch of {total} samples (batch_size {batch} x devices {devices} x accumulate "
            f"{accumulate} x nodes {nodes}) cannot be divided among them. Use {', '.join(fitting)} GPUs"
        )
    batch = max(size for size in range(1, batch + 1) if share % size == 0)
    print(f"{gpus} GPUs x batch_size {batch} x accumulate {share // batch} x {nodes} nodes = {total}, the total batch")
    more = [f"--data.batch_size={batch}", f"--model.init_args.accumulate={share // batch}"]
    if gpus > 1 and setting_given(words, settings, "trainer.strategy") in (None, "auto"):
        more.append("--trainer.strategy=ddp")
    return ["--trainer.accelerator=gpu", f"--trainer.devices={gpus}", *more]


def _linked_model(words: Sequence[str], settings: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """The flag by which a run of another experiment than the YAML's starts from a model of its own experiment.

    Args:
        words: the command line.
        settings: those of the YAML files.
        names: the experiment of the YAML, and of the run.
    """
    model = str(_find(settings, "model.model"))
    there = Path(settings.get("outputs", "outputs"), names[0])
    here = Path(str(setting_given(words, settings, "outputs") or "outputs"), names[1])
    if last_given(words, *MODEL_FLAGS) is not None or Path(model).name != "merged" or here == there:
        return []
    if Path(model).parent.parent != there:
        return []
    return [f"--model.init_args.model={here / Path(model).parent.name / 'merged'}"]


def replaced(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """ "name=value" of each setting that has another value than the first one that a flag of the command line gives."""
    settings, found = read_yamls(words), []
    for name in names:
        first = next((value for flag, value in pairwise(words) if flag == f"--{name}"), None)
        if (value := setting_given(words, settings, name)) != first and first is not None:
            found.append(f"{name}={value}")
    return found


def setting_given(words: Sequence[str], settings: Mapping[str, Any], name: str) -> Any:
    """The value of a setting in the command line, else in the YAML files; None without one.

    As in the parser, a YAML file that stands behind the flag has the last word.
    """
    names = (name, name.replace("model.", "model.init_args.", 1))
    value, behind = last_given(words, *names), list(words)
    while value is not None and last_given(behind, *names) is not None:
        behind = behind[1:]
    later = None if value is None else _find(read_yamls(behind), name)
    return _find(settings, name) if value is None else value if later is None else later


def given_shards(words: Sequence[str], settings: Mapping[str, Any]) -> list[str | Path]:
    """The sources of a training's shards, from its command line or its YAML files; [] where neither names any."""
    shards = setting_given(words, settings, "data.shards")
    if isinstance(shards, str) and shards.startswith(("[", "{")):  # a list, or sources with weights, in a flag
        with contextlib.suppress(yaml.YAMLError):
            shards = yaml.safe_load(shards)
    return source_list(shards) if shards else []


def given_modules(words: Sequence[str], settings: Any) -> list[str]:
    """The modules of all classes that the flags or the YAML files name, by class_path or by the path alone, such as
    --trainer.callbacks+=callbacks.throughput.Throughput."""
    values = [word.partition("=")[2] if word.startswith("--") else word for word in words]
    read = []
    for value in values:
        with contextlib.suppress(ValueError, yaml.YAMLError):
            read.append(yaml.safe_load(value))
    given = [settings, read]
    return [*class_modules(given), *(path.rpartition(".")[0] for path in _texts(given) if CLASS_PATH.fullmatch(path))]


def _texts(value: Any) -> Iterator[str]:
    """All texts that are values of settings, at any depth."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _find(settings: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name; "init_args" may be left out of it. None without one."""
    for part in name.split("."):
        if not isinstance(settings, Mapping):
            return None
        arguments = settings.get("init_args")
        settings = settings.get(part, arguments.get(part) if isinstance(arguments, Mapping) else None)
    return settings


def laid_over(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the values of `changes`, name by name; lists are replaced completely."""
    merged = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = laid_over(merged[name], value) if both else value
    return merged
