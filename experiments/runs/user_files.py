"""Users' own Python files, such as rewards, that a YAML names by class path. They may be in the folder of the YAML."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

ALSO = "MIG_USER_FOLDERS"  # variable with further folders: those of YAML files that a command has copied elsewhere


def find_user_files(words: Iterable[str]) -> None:
    """Let Python import modules from the folders of the YAML files in `words`, such as a command line.

    The working directory is searched already: commands are started with `python -m`.
    """
    folders = [*_yaml_folders(words), *filter(None, os.environ.get(ALSO, "").split(os.pathsep))]
    # Last in the search path, so that a file beside a YAML cannot hide an installed package.
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


def also_beside(files: Iterable[str]) -> None:
    """Let `find_user_files`, here and in all processes that are started from here, search beside these YAML files too.

    For the files from which a command makes a YAML in another folder.
    """
    known = filter(None, os.environ.get(ALSO, "").split(os.pathsep))
    os.environ[ALSO] = os.pathsep.join(dict.fromkeys([*known, *_yaml_folders(files)]))


def _yaml_folders(words: Iterable[str]) -> list[str]:
    files = [Path(word.partition("=")[2] if word.startswith("--") else word) for word in words]
    return [str(file.resolve().parent) for file in files if file.suffix in (".yaml", ".yml") and file.is_file()]
