"""The pages keep what they promise: links lead somewhere, commands parse, files and classes that they name exist.

`tests/documents.py` reads the pages, `tests/parse_commands.py` parses all commands in one process. Nothing is run.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from experiments.runs.renamed_settings import find_old_flags, find_old_names
from tests.documents import HISTORY, Code, Page, commands, is_placeholder, module_command, read_page
from tests.outside_make import outside_make
from tests.tutorials import marked_blocks

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Paths that pages name before they exist. A path is removed from here as soon as its file is there.
COMING: set[str] = set()
PACKAGES = "datamodules|lightning_modules|callbacks|experiments"
PATH = re.compile(rf"(?<![\w/.<>-])((?:{PACKAGES}|tests|docs|models)/[\w./*{{}},-]*)(?![<…\w])")
NAME = re.compile(rf"(?<![\w/.-])((?:{PACKAGES})(?:\.\w+)+)(?![\w/*])(?!\.\*)")
BASENAME = re.compile(r"(?<![\w/.*<-])(\w+\.py)\b")

Command = tuple[str, list[str]]


def load_page(name: str, root: Path = ROOT) -> Page:
    return read_page(root / name, HISTORY.get(name))


def link_faults(page: Page, root: Path) -> Iterator[str]:
    """Relative links to files that do not exist, and anchors that no heading has."""
    for line, target in page.links:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file) if file else page.path
        if not path.resolve().is_relative_to(root.resolve()) or not path.exists():
            yield f"line {line}: {target}: no such file"
        elif anchor and (path.suffix != ".md" or anchor not in read_page(path).headings):
            yield f"line {line}: {target}: no such heading"


def expand(pattern: str) -> list[str]:
    """`a/{b,c}.py` as its two patterns."""
    if found := re.search(r"\{([^{}]*)\}", pattern):
        texts = [pattern[: found.start()] + part + pattern[found.end() :] for part in found[1].split(",")]
        return [each for text in texts for each in expand(text)]
    return [pattern]


def is_tree(code: Code) -> bool:
    """Whether a code block is the README's file tree, whose names are relative to the line above."""
    return code.text.startswith("datamodules/ ")


def old_names(text: str) -> Iterator[str]:
    """The cures of old names in code: flags, class paths, YAML keys, and full names of settings, `model.beta`."""
    words = [f"{name}: 0" for name in re.findall(r"(?<![\w.-])(?:\w+\.)+\w+|\w+(?=:)", text)]
    yield from find_old_flags(text)
    yield from (cure for each in (text, *words) for _, cure in find_old_names(each))


def path_faults(page: Page, root: Path = ROOT) -> Iterator[str]:
    """Paths of the repository in code that do not exist; old names of settings."""
    names = {file.name for file in root.rglob("*.py") if ".venv" not in file.parts}
    for code in page.code:
        for found in PATH.finditer("" if is_tree(code) else code.text):
            for pattern in expand(found[1].rstrip(".,:")):
                if not glob(str(root / pattern)) and pattern not in COMING:
                    yield f"line {code.line}: {pattern}: no such path"
        if code.language is None:
            for name in BASENAME.findall(code.text):
                if name not in names:
                    yield f"line {code.line}: {name}: no file has this name"
        yield from {f"line {code.line}: {cure}" for cure in old_names(code.text)}


def dotted_names(page: Page) -> Iterator[tuple[int, str]]:
    """(line, name) of every class, function or module of the project that code on the page names."""
    for code in page.code:
        for found in NAME.finditer(code.text):
            if not found[1].endswith((".py", ".yaml", ".md")):
                yield code.line, found[1]


def python_imports(page: Page) -> Iterator[tuple[int, str]]:
    """(line, name) of what the page's Python examples import from the project. A SyntaxError is raised."""
    for code in page.code:
        if code.language == "python":
            for node in ast.walk(ast.parse(code.text)):
                if isinstance(node, ast.ImportFrom) and re.match(PACKAGES, node.module or ""):
                    yield from ((code.line, f"{node.module}.{alias.name}") for alias in node.names)


def make_faults(words: Sequence[str], named: bool = False) -> tuple[list[str], list[Command]]:
    """The faults of a make command, and the commands of the project that it would run (`make -n`): none where it is
    only `named`, as in prose, since it may need arguments."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+)\s*[?:]?=", makefile, re.MULTILINE))
    faults, given = [], []
    for word in takewhile(lambda word: word != ">", words[1:]):  # what the shell does with the output is not make's
        name, joined, _ = word.partition("=")
        if joined and name not in variables:
            faults.append(f"the Makefile has no variable {name}")
        elif not joined and word not in targets and not is_placeholder(word):
            faults.append(f"the Makefile has no target {word}")
        if not is_placeholder(word) and not word.endswith("=…"):
            given.append(word)
    if faults or named or not any("=" not in word for word in given):
        return faults, []
    command = ["make", "--dry-run", "--no-print-directory", *given]
    shown = subprocess.run(command, cwd=ROOT, env=outside_make(), capture_output=True, text=True)
    if shown.returncode:
        return [shown.stderr.strip()], []
    lines = Code(shown.stdout, 0, "")
    return [], [found for _, found in project_commands(lines)]


def project_commands(code: Code) -> Iterator[tuple[int, Command]]:
    """(line, (module, arguments)) of the commands in `code` that run a module of the project."""
    for line, words in commands(code):
        found = module_command(words)
        if found and re.match(rf"({PACKAGES}|tests)\.", found[0]):
            yield line, found


def collect(page: Page) -> tuple[list[str], list[tuple[int, Command]]]:
    """Faults of the page's make commands and of the scripts that it runs, and its project commands with their lines."""
    faults, found, copies = [], [], {}
    saved = {block.file for block in marked_blocks(page.path)}
    for code in page.code:
        copies |= {words[2]: words[1] for _, words in commands(code) if words[0] == "cp" and len(words) == 3}
        found += project_commands(code)
        for line, words in commands(code):
            if words[0] == "make" and len(words) > 1:
                wrong, inner = make_faults(words, named=code.language is None and len(words) == 2)
                faults += [f"line {line}: {' '.join(words)}: {fault}" for fault in wrong]
                found += [(line, command) for command in inner]
            elif len(words) > 1 and re.fullmatch(r"(python3?|sbatch) \S+\.\w+", " ".join(words[:2])):
                exists = words[1] in saved or (ROOT / words[1]).is_file()
                faults += [] if exists else [f"line {line}: {words[1]}: no such file"]
    # A copy is read as its original. Of a command whose only configuration is on the page, nothing would be left to
    # parse: `test_configs.py` reads that page.
    found = [(line, (module, [copies.get(word, word) for word in words])) for line, (module, words) in found]
    return faults, [
        (line, (module, without_saved(words, saved)))
        for line, (module, words) in found
        if not (module == "experiments.ablations" and saved.intersection(words))
    ]


def start_faults(found: Sequence[tuple[int, Command]]) -> Iterator[str]:
    """Commands that train GRPO in an experiment without a CoT-SFT model: it starts from that of its own experiment."""
    trained = set()
    for line, (module, words) in found:
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        flags |= {word[2:]: after for word, after in pairwise(words) if word.startswith("--") and "=" not in word}
        name = flags.get("experiment")
        if module != "experiments.train" or name is None or is_placeholder(name):
            continue
        if not any("grpo" in word for word in words if word.endswith(".yaml")):
            trained.add(name)
        elif "model.model" not in flags and name not in trained:
            yield f"line {line}: outputs/{name} has no model to start from; add --model.model, or train it before"


def without_saved(words: list[str], saved: set[str | None]) -> list[str]:
    """A command without the configurations that a reader of the page has saved: no parser could read them here.

    `tests/test_tutorials.py` runs such commands.
    """
    dropped = {place for place, word in enumerate(words) if word in saved and words[place - 1] == "--config"}
    return [word for place, word in enumerate(words) if place not in dropped and place + 1 not in dropped]


def ask_parsers(asked: Sequence[Command], names: Sequence[str]) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """The faults of commands, by their JSON, and of dotted names. One process does all: it imports each module once."""
    unique = sorted({json.dumps(command) for command in asked})
    given = {"commands": [json.loads(text) for text in unique], "names": sorted(set(names))}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.parse_commands"],
        cwd=ROOT,
        env=environment,
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return dict(zip(unique, found["commands"], strict=True)), dict(zip(given["names"], found["names"], strict=True))


BROKEN = {
    "a file that is gone": "[text](gone.md)",
    "an anchor that is gone": "[text](page.md#no-such-heading)",
    "an image that is gone": '<img src="gone.svg" alt="">',
    "a path that is gone": "Look at `datamodules/samples/gone.py`.",
    "a file's name that no file has": "Look at `no_such_file_here.py`.",
    "a target that is gone": "    make no-such-target",
    "a variable of make that is misspelt": '    make grpo ARG="--model.max_new_tokens=8"',
    "a flag of make's command that is gone": '    make grpo ARGS="--model.no_such_field=1"',
    "a value of the wrong type": "Use `make grpo SEED=abc` for it.",
    "a flag that is gone": "    python -m experiments.compare --no_such_flag 3",
    "a module that is gone": "    python -m experiments.no_such_module --config experiments/configs/nano/grpo.yaml",
    "an override that is gone": """    make pipeline ARGS='--overrides.grpo="--model.no_such_field=1"'""",
    "GRPO of an experiment without a model": '    make grpo ARGS="--experiment longer"',
    "a class that is gone": "`callbacks.previews.NoSuchClass` draws.",
    "an old flag": "Set `--data.convention=relative_1000`.",
    "an old name of a setting": "Raise `model.max_new_tokens`.",
    "an old key": "```yaml\nmodel: {init_args: {beta: 0.01}}\n```",
    "an import that is gone": "```python\nfrom datamodules.samples.sample import NoSuchClass\n```",
}
SOUND = """# A page

[here](#a-page) and [there](page.md#a-page), `datamodules/samples/{sample,boxes}.py`, `stream.py`, `make <target>`,
`outputs/<experiment>/<phase>/`, `callbacks.previews.Previews`, `make sft …`

    make eval MODEL=gpt-4o BENCH=blink ARGS="--endpoint.base_url http://…/v1"  # a server
    python -m experiments.train --config experiments/configs/nano/grpo.yaml --experiment NAME … \\
        --trainer.devices=8
    make sft ARGS="--experiment mine"
    make grpo ARGS="--experiment=mine"
"""


def page_of(text: str, folder: Path) -> Page:
    (folder / "page.md").write_text(text)
    return read_page(folder / "page.md")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """What the parsers say of all commands and names, of the pages and of the broken examples."""
    folder = tmp_path_factory.mktemp("broken")
    pages = [load_page(name) for name in PAGES] + [page_of(text, folder) for text in (SOUND, *BROKEN.values())]
    found = [command for page in pages for _, command in collect(page)[1]]
    names = [name for page in pages for _, name in (*dotted_names(page), *python_imports(page))]
    return ask_parsers(found, names)


def all_faults(page: Page, root: Path, verdicts: tuple[dict[str, str | None], dict[str, str | None]]) -> list[str]:
    """Everything that is wrong with a page, each with its line."""
    by_command, by_name = verdicts
    faults, found = collect(page)
    faults += [*link_faults(page, root), *path_faults(page), *start_faults(found)]
    for line, (module, words) in found:
        if fault := by_command[json.dumps((module, words))]:
            faults.append(f"line {line}: {module} {' '.join(words)}: {fault}")
    for line, name in (*dotted_names(page), *python_imports(page)):
        if fault := by_name[name]:
            faults.append(f"line {line}: {fault}")
    return faults


@pytest.mark.parametrize("name", PAGES)
def test_links_paths_commands_and_classes_of_a_page_exist(name: str, verdicts) -> None:
    assert all_faults(load_page(name), ROOT, verdicts) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_page_is_found(what: str, verdicts, tmp_path: Path) -> None:
    assert all_faults(page_of(BROKEN[what], tmp_path), tmp_path, verdicts) != []


def test_placeholders_are_no_faults(verdicts, tmp_path: Path) -> None:
    page = page_of(SOUND, tmp_path)
    assert all_faults(page, tmp_path, verdicts) == []
    modules = {module for _, (module, _) in collect(page)[1]}
    assert {"experiments.evaluate", "experiments.train"} <= modules, "the commands were seen"


def test_a_history_is_read_for_its_links_alone(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("`a/now.py`\n\n## History\n\n`a/then.py`, [gone](gone.md)\n\n    make gone\n")
    page = read_page(tmp_path / "page.md", "History")
    assert [code.text for code in page.code] == ["a/now.py"]
    assert list(link_faults(page, tmp_path)) == ["line 5: gone.md: no such file"]
    for name, heading in HISTORY.items():
        assert f"\n## {heading}\n" in (ROOT / name).read_text(), "a page with a history begins with a summary"


def test_no_file_that_exists_is_called_coming() -> None:
    assert [path for path in COMING if (ROOT / path).exists()] == []


def source_texts() -> list[str]:
    """Every string in the production code; values inside an f-string are cut out, as U+FFFC."""
    texts = []
    for file in (path for package in PACKAGES.split("|") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\ufffc" for part in node.values)
                texts.append("".join(parts))
    return texts


def message_faults(page: Page, texts: Sequence[str]) -> list[str]:
    """Messages quoted in blocks of language `text` that the code does not write. `…` stands for a value."""
    quoted = [line for code in page.code if code.language == "text" for line in code.text.splitlines()]
    parts = [part.strip() for line in quoted for part in line.split("…")]
    return [part for part in parts if len(part) > 3 and not any(part in text for text in texts)]


def test_the_messages_in_troubleshooting_are_those_of_the_code(tmp_path: Path) -> None:
    texts = source_texts()
    page = load_page("docs/troubleshooting.md")
    assert len([code for code in page.code if code.language == "text"]) > 10, "the page quotes messages"
    assert message_faults(page, texts) == []
    broken = page_of("```text\n… is already done with these settings\nno command says this\n```\n", tmp_path)
    assert message_faults(broken, texts) == ["no command says this"]


def tree_faults(text: str) -> list[str]:
    """Names in the README's file tree that do not exist. Each level is indented by two spaces."""
    block = next(code for code in read_page(ROOT / text).code if is_tree(code))
    faults, folders = [], []
    for line in block.text.splitlines():
        name = line.split()[0].rstrip(",")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        path = "/".join(part.strip("/") for part in folders)
        if not glob(str(ROOT / path)) and not path.startswith(("outputs", "data/")):
            faults.append(path)
    return faults


def test_the_file_tree_of_the_readme_is_true() -> None:
    assert tree_faults("README.md") == []
