"""Users' own Python files, such as rewards, that a YAML names by class path: they may lie beside the YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path


def find_user_files(words: Iterable[str]) -> None:
    """Let Python import the modules that lie beside the YAML files among `words`, such as a command line.

    The working directory is searched already: commands are started with `python -m`.
    """
    for word in words:
        file = Path(word.partition("=")[2] if word.startswith("--") else word)
        folder = str(file.resolve().parent)
        # Last in the search, so that a file beside a YAML hides no installed package.
        if file.suffix in (".yaml", ".yml") and file.is_file() and folder not in sys.path:
            sys.path.append(folder)
