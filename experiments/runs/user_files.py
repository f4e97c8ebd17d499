"""Users' own Python files, such as rewards, that a YAML names by class path. They may be in the folder of the YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path


def find_user_files(words: Iterable[str]) -> None:
    """Let Python import modules from the folders of the YAML files in `words`, such as a command line.

    The working directory is searched already: commands are started with `python -m`.
    """
    for word in words:
        file = Path(word.partition("=")[2] if word.startswith("--") else word)
        folder = str(file.resolve().parent)
        # Last in the search path, so that a file beside a YAML cannot hide an installed package.
        if file.suffix in (".yaml", ".yml") and file.is_file() and folder not in sys.path:
            sys.path.append(folder)
