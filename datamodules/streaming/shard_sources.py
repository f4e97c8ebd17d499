"""Sources of shards: read the setting `data.shards`, and list the shards that it names.

A source is a folder with a manifest, or some tar files of such a folder as a brace list:

    data/mgrounding/all                                     a local folder
    /data/shards/shard-{00000..00011}.tar                   twelve tar files of a folder
    https://host/shards    s3://bucket/shards    gs://bucket/shards    hf://datasets/owner/name[@revision]/shards
    pipe:ssh host cat /data/shards/{}                       a shell command; {} is the name of the file

Several sources are a list. A mapping {source: weight} mixes them; each source gets its weight's share of the samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from datamodules.streaming.manifest import in_folder, is_remote, local_path, read_manifest
from datamodules.streaming.url_openers import PIPE, SCHEMES, scheme_of

Sources = str | Path | Sequence[str | Path] | Mapping[str, float]  # data.shards
# largest number of shards of one source; a typing error in a brace list could name more than fit into memory
MOST_SHARDS = 1_000_000
NUM_NAMED = 3  # number of names in a message

_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")
_TAR_IN_COMMAND = re.compile(r"[^\s/'\"=]+\.tar(?![^\s'\"])")


class Shard(NamedTuple):
    """One shard of a manifest. `location` is its path, or its URL if it is remote."""

    location: str
    name: str
    count: int  # number of samples
    bytes: int
    sha256: str
    is_remote: bool
    tasks: tuple[str, ...] = ()  # of its samples


def source_list(sources: Sources) -> list[str | Path]:
    """The sources of `data.shards` without their weights."""
    return [sources] if isinstance(sources, str | Path) else list(sources)


def mixing_weights(sources: Sources) -> list[float] | None:
    """The weight of each source, normalised to sum 1; None if the sources are joined without weights."""
    if not isinstance(sources, Mapping):
        return None
    total = math.fsum(sources.values())
    return [weight / total for weight in sources.values()]


def source_faults(sources: Sources) -> list[str]:
    """Problems of `data.shards` that can be found without reading a file or asking a server."""
    texts = [str(source) for source in source_list(sources)]
    faults = [] if texts else [f"shards={sources!r} names no folder"]
    if isinstance(sources, Mapping):
        usable = {text: not isinstance(w, bool) and math.isfinite(w) and w > 0 for text, w in sources.items()}
        faults += [
            f"shards: the weight {sources[text]} of {text!r} is not above 0" for text in texts if not usable[text]
        ]
    faults += [f"shards={text!r} is there twice" for text in dict.fromkeys(texts) if texts.count(text) > 1]
    for text in texts:
        scheme = scheme_of(text)
        if scheme not in (None, "file", "pipe", *SCHEMES):
            faults.append(f"shards={text!r}: {scheme}:// is none of {', '.join(SCHEMES)}")
        if scheme in ("http", "https") and re.search("[?#]", text):
            faults.append(f"shards={text!r}: a URL of shards has neither ? nor #, since names are put behind it")
        if scheme == "pipe" and "{}" not in text and not _TAR_IN_COMMAND.search(text):
            faults.append(f"shards={text!r}: the command has neither {{}} nor a .tar in the place of a file's name")
    return faults


def read_shards(source: str | Path) -> list[Shard]:
    """The shards of one source in their order, as its manifest declares them.

    Raises:
        ValueError: the source or its manifest is wrong, or the manifest does not contain a shard of the source, so that
            its content cannot be checked.
        FetchError: the manifest cannot be downloaded.
    """
    if faults := source_faults(source):
        raise ValueError("; ".join(faults))
    shards: list[Shard] = []
    for folder, names in _folders(str(source)):
        entries = {entry["name"]: entry for entry in read_manifest(folder)["shards"]}
        if unknown := [name for name in names or () if name not in entries]:
            shown = ", ".join(unknown[:NUM_NAMED]) + (" …" if len(unknown) > NUM_NAMED else "")
            raise ValueError(f"{len(unknown)} shards of {source} are not in the manifest of {folder}: {shown}")
        remote = is_remote(folder)
        for name in entries if names is None else names:
            entry = entries[name]
            location = in_folder(folder, name)
            shards.append(
                Shard(location, name, entry["count"], entry["bytes"], entry["sha256"], remote, tuple(entry["tasks"]))
            )
    return shards


def repeated_shard(shards: Sequence[Shard]) -> str | None:
    """The problem that two sources hold the same shard, such as a folder and one below it; None if there is none."""
    seen: set[str] = set()
    for shard in shards:
        if shard.location in seen:
            return f"two sources of shards hold {shard.location}: each of its samples would be read twice"
        seen.add(shard.location)
    return None


def is_brace_list(source: str | Path) -> bool:
    """Whether the text names several folders, or tar files of a folder, and not a single folder."""
    return _folders(str(source)) != [(str(source), None)]


def _folders(source: str) -> list[tuple[str, list[str] | None]]:
    """(folder, names of tar files) of a source; the names are None if all shards of the manifest are meant."""
    is_here = not is_remote(source) and local_path(source).exists()  # braces may be part of a name
    places = [source] if is_here else _expand(source)
    found: list[tuple[str, list[str] | None]] = []
    for folder, name in (_split(place) for place in places):
        if name is not None and found and found[-1][0] == folder and found[-1][1] is not None:
            found[-1][1].append(name)
        else:
            found.append((folder, None if name is None else [name]))
    return found


def _expand(source: str) -> list[str]:
    """The locations in a brace list, such as a{0..2} or a{x,y}. {} is not changed."""
    # They are counted first, because braceexpand keeps all numbers of all ranges in memory.
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(source)) > MOST_SHARDS:
        raise ValueError(f"shards={source!r} names more than {MOST_SHARDS:,} shards")
    try:
        return list(braceexpand(source, escape=False))
    except UnbalancedBracesError as error:
        raise ValueError(f"shards={source!r}: {error}") from error


def _split(place: str) -> tuple[str, str | None]:
    """(folder, name) of one tar file; (folder, None) for a whole folder."""
    if place.startswith(PIPE) and "{}" not in place:
        # The last tar file in the command is the shard; the manifest is in the same folder.
        found = list(_TAR_IN_COMMAND.finditer(place))[-1]
        return f"{place[: found.start()]}{{}}{place[found.end() :]}", found[0]
    if place.startswith(PIPE) or not place.endswith(".tar"):
        return place, None
    folder, _, name = place.rpartition("/")
    return folder or ("/" if place.startswith("/") else "."), name
