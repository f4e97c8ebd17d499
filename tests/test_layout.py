"""The rules of the code's structure, held by reading imports with ast: nothing is imported here."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A package imports itself and those before it.
PACKAGES = ("datamodules", "lightning_modules", "callbacks", "experiments")

# The rooms of a package (its folders), top down. A room imports itself and the rooms below it. Files at a package's own
# top may import every room of the package, and no room imports them, but for those that the order names.
ROOMS = {
    "datamodules": (
        ("synthetic/benchmark_replicas", "synthetic/multi_box"),
        ("importers", "synthetic"),
        ("importers/own_data",),
        ("importers/reading",),
        ("metrics",),
        ("benchmarks",),
        ("benchmarks/reading",),
        ("streaming",),
        ("encoding",),
        ("images", "checkpoints"),
        ("samples",),
        ("persistence",),
    ),
    "lightning_modules": (
        ("rl",),
        ("rl/rewards",),
        ("predictors",),
        ("rollouts/native", "rollouts/vllm"),
        ("rollouts", "training"),
        ("models",),
        ("models/inference",),
        ("models/attention",),
        ("models/layers",),
        ("models/architectures",),
        ("serving", "metrics"),
    ),
    "callbacks": (),
    "experiments": (
        ("reports/predictions", "reports/live"),
        ("reports", "runs/sharing", "asking"),
        ("evaluation", "sweeps", "nano", "bench", "runs/command_line", "runs/overview", "reports/drawing"),
        ("runs/tracking",),
        ("runs", "synthesis"),
    ),
}
# Without __init__.py. A room that is full is divided: some of its files, and their tests, go to a room inside it.
MOST_FILES = 14
# Files and folders at a package's own top, without __init__.py.
MOST_ENTRIES = {"datamodules": 14, "lightning_modules": 14, "callbacks": 16, "experiments": 20}
# A file's name exists once, so that it means one file. These names stand in several rooms: a benchmark and the callback
# that measures it in training, a data set as benchmark and as importer.
SHARED_NAMES = {"__init__", "base", "registry", "engine", "mig_bench", "odinw"}

# Pure functions and records: they run, and are tested, without Lightning or transformers.
LEAVES = (
    "datamodules/samples/boxes.py",
    "datamodules/samples/sample.py",
    "datamodules/samples/answer_text.py",
    "datamodules/encoding/messages.py",
    "datamodules/encoding/model_families.py",
    "datamodules/samples/scores.py",
    "datamodules/samples/choice_text.py",
    "datamodules/metrics/scoring.py",
    "datamodules/metrics/result_files.py",
    "lightning_modules/predictors/ask.py",
    "datamodules/benchmarks/registry.py",
    "lightning_modules/models/attention/packed_rows.py",
    "lightning_modules/rl/rewards/reward_list.py",
    "lightning_modules/rl/losses.py",
    "experiments/runs/results.py",
)
# Base training and speed benchmarks run on a bare machine that lacks these packages.
BARE_ENTRY_POINTS = ("experiments/nano/pretrain.py", "experiments/bench/run.py", "experiments/bench/our_contender.py")
# RefCOCO is published as a pickle. Here alone one is read, by an Unpickler that refuses every class and function.
PLAIN_PICKLE = "datamodules/importers/plain_pickle.py"
# Images come from files that somebody else wrote. Here alone they are opened, as one of a stated list of formats.
IMAGE_LOADING = "datamodules/images/image_loading.py"
# The one file that loads models, configurations, processors and tokenizers.
LOADER = "datamodules/checkpoints/pretrained.py"
OPTIONAL = {"wandb", "webdataset", "jsonargparse"}


def imported_names(source: str, at_import_time: bool = False) -> Iterator[str]:
    """Every dotted module name that `source` imports; only those run when the module itself is imported, if asked."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: relative import; name the package in full"
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif at_import_time and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            elif at_import_time and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(ast.Module(body=child.orelse, type_ignores=[]))
            else:
                yield from visit(child)

    return visit(ast.parse(source))


def direction_faults(root: Path) -> list[str]:
    """Imports that go up a package, as 'file imports module'."""
    faults = []
    for level, package in enumerate(PACKAGES):
        above = set(PACKAGES[level + 1 :]) | {"tests"}
        for file in sorted((root / package).rglob("*.py")):
            names = {name.split(".")[0] for name in imported_names(file.read_text())}
            faults += [f"{file.relative_to(root)} imports {name}" for name in sorted(names & above)]
    return faults


def room_of(file: Path, root: Path) -> tuple[str, str]:
    """(package, room) of a file: the room is its folder in the package, or the file's own name at the package's top."""
    package, *parts = file.relative_to(root).parts
    return package, "/".join(parts[:-1]) or parts[0]


def imported_files(file: Path, root: Path, at_import_time: bool = False) -> Iterator[Path]:
    """The files of the packages that a file imports by name; those for type checkers alone do not count."""
    for name in set(imported_names(file.read_text(), at_import_time)):
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if name.split(".")[0] in PACKAGES and path.is_file():
            yield path


def room_faults(root: Path) -> list[str]:
    """Imports that go up, or sideways, between the rooms of a package, as 'file imports file'."""
    faults = []
    for package, levels in ROOMS.items():
        level_of = {room: level for level, rooms in enumerate(levels) for room in rooms}
        for file in sorted((root / package).rglob("*.py")):
            own = room_of(file, root)[1]
            for other in imported_files(file, root, at_import_time=False):
                other_package, room = room_of(other, root)
                if other_package != package or room == own or is_for_type_checkers(file, other, root):
                    continue
                goes_up = own in level_of and (room not in level_of or level_of[room] <= level_of[own])
                if goes_up or (room.endswith(".py") and room not in level_of and own in level_of):
                    faults.append(f"{file.relative_to(root)} imports {other.relative_to(root)}")
    return faults


def is_for_type_checkers(file: Path, other: Path, root: Path) -> bool:
    """Whether `file` imports `other` under TYPE_CHECKING alone."""
    name = ".".join(other.relative_to(root).with_suffix("").parts)
    tree = ast.parse(file.read_text())
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    inside = {found for node in guarded for part in node.body for found in imported_names(ast.unparse(part))}
    for node in guarded:
        node.body = [ast.Pass()]
    return name in inside and name not in set(imported_names(ast.unparse(tree)))


def import_circles(root: Path) -> list[set[str]]:
    """Groups of files that import one another, at import time or later."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    below = {
        file: {other for other in imported_files(file, root) if not is_for_type_checkers(file, other, root)}
        for file in files
    }
    reached: dict[Path, set[Path]] = {}
    for file in files:
        waiting, seen = list(below[file]), set()
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += below.get(other, ())
        reached[file] = seen
    circles = {
        frozenset({file} | {o for o in reached[file] if file in reached[o]}) for file in files if file in reached[file]
    }
    return [{str(file.relative_to(root)) for file in circle} for circle in sorted(circles, key=sorted)]


def import_closure(root: Path, entry: str) -> dict[str, str]:
    """Top-level package -> the file that imports it, over all that importing `entry` runs."""
    found: dict[str, str] = {}
    waiting, seen = [root / entry], set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported_names(file.read_text(), at_import_time=True):
            parts = name.split(".")
            found.setdefault(parts[0], str(file.relative_to(root)))
            if parts[0] in PACKAGES:
                for depth in range(1, len(parts) + 1):
                    base = root.joinpath(*parts[:depth])
                    waiting += [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return found


def python_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def test_every_package_exists_and_holds_code() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()
        assert len(list((ROOT / package).rglob("*.py"))) > 1


def test_no_package_imports_a_package_above_it() -> None:
    assert direction_faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("datamodules/a.py", "import lightning_modules.rl.rewards"),
        ("datamodules/deep/a.py", "from callbacks.previews import Previews"),
        ("lightning_modules/a.py", "def late():\n    from experiments import train"),
        ("callbacks/a.py", "if True:\n    import experiments"),
        ("datamodules/a.py", "import tests.conftest"),
    ],
)
def test_an_added_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "good.py").write_text("import datamodules.samples.boxes\nimport torch\n")
    assert direction_faults(tmp_path) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line + "\n")
    assert [fault.split(" ")[0] for fault in direction_faults(tmp_path)] == [file]


def test_no_room_imports_a_room_above_it_and_no_files_import_each_other_in_a_circle() -> None:
    assert room_faults(ROOT) == []
    assert import_circles(ROOT) == []


def test_every_folder_of_code_is_a_room_with_a_place_in_the_order_and_few_files() -> None:
    named = {f"{package}/{room}" for package, levels in ROOMS.items() for rooms in levels for room in rooms}
    for package in PACKAGES:
        for folder in (ROOT / package).rglob("__init__.py"):
            if folder.parent != ROOT / package:
                room = str(folder.parent.relative_to(ROOT))
                files = [file.name for file in folder.parent.glob("*.py") if file != folder]
                assert room in named, f"{room}: give it a place in ROOMS"
                assert len(files) <= MOST_FILES, f"{room} is full with {MOST_FILES} files: divide it"
    assert all((ROOT / room).exists() for room in named)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("datamodules/samples/a.py", "from datamodules.encoding.good import x"),
        ("datamodules/streaming/a.py", "def late():\n    import datamodules.benchmarks.good"),
        ("lightning_modules/models/layers/a.py", "from lightning_modules.models.attention import good"),
        ("lightning_modules/rl/a.py", "from lightning_modules import grpo"),
        ("experiments/runs/a.py", "from experiments import train"),
    ],
)
def test_an_added_import_between_rooms_that_goes_up_is_found(tmp_path: Path, file: str, line: str) -> None:
    for good in ("samples", "encoding", "streaming", "benchmarks"):
        (tmp_path / "datamodules" / good).mkdir(parents=True)
        (tmp_path / "datamodules" / good / "good.py").write_text("x = 1\n")
    for good in ("models/layers", "models/attention", "rl"):
        (tmp_path / "lightning_modules" / good).mkdir(parents=True)
        (tmp_path / "lightning_modules" / good / "good.py").write_text("x = 1\n")
    (tmp_path / "lightning_modules/grpo.py").write_text("from lightning_modules.rl.good import x\n")
    (tmp_path / "experiments/runs").mkdir(parents=True)
    (tmp_path / "experiments/train.py").write_text("x = 1\n")
    assert room_faults(tmp_path) == []
    (tmp_path / file).write_text(line + "\n")
    assert [fault.split(" ")[0] for fault in room_faults(tmp_path)] == [file]


def test_an_added_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "datamodules/a.py").write_text("from datamodules import b\n")
    (tmp_path / "datamodules/b.py").write_text("import torch\n")
    assert import_circles(tmp_path) == []
    (tmp_path / "datamodules/b.py").write_text("def late():\n    from datamodules.a import x\n")
    assert import_circles(tmp_path) == [{"datamodules/a.py", "datamodules/b.py"}]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datamodules.a import x\n"
    (tmp_path / "datamodules/b.py").write_text(typed)
    assert import_circles(tmp_path) == []


def test_the_top_of_a_package_stays_short_and_a_name_means_one_file() -> None:
    for package, most in MOST_ENTRIES.items():
        entries = [path for path in (ROOT / package).iterdir() if path.name not in ("__pycache__", "__init__.py")]
        assert len(entries) <= most, f"{package}/ is full with {most} entries: {sorted(path.name for path in entries)}"
    names = [file.stem for file in python_files()]
    assert {name for name in names if names.count(name) > 1} <= SHARED_NAMES


def test_init_files_hold_at_most_a_docstring() -> None:
    for file in python_files():
        if file.name == "__init__.py":
            body = ast.parse(file.read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), file


@pytest.mark.parametrize("file", LEAVES)
def test_leaves_import_neither_lightning_nor_transformers(file: str) -> None:
    heavy = {"lightning", "pytorch_lightning", "transformers", "peft", "wandb", "webdataset", "jsonargparse"}
    assert heavy & set(import_closure(ROOT, file)) == set()


@pytest.mark.parametrize("file", BARE_ENTRY_POINTS)
def test_bare_entry_points_need_no_optional_package(file: str) -> None:
    closure = import_closure(ROOT, file)
    assert {name: closure[name] for name in OPTIONAL & set(closure)} == {}


def test_evaluating_a_served_model_loads_no_model_classes() -> None:
    closure = import_closure(ROOT, "experiments/evaluate.py")
    heavy = {"lightning", "transformers", "peft", "wandb", "openai"}
    assert {name: closure[name] for name in heavy & set(closure)} == {}


@pytest.mark.parametrize(
    "file", ["experiments/import_shards.py", "experiments/pipeline.py", "experiments/sweep.py", "experiments/train.py"]
)
def test_commands_that_compute_no_tensor_load_no_torch(file: str) -> None:
    """It takes seconds and hundreds of megabytes, in each worker of an import again."""
    closure = import_closure(ROOT, file)
    assert {name: closure[name] for name in {"torch", "lightning", "transformers"} & set(closure)} == {}


def test_an_optional_import_is_found_through_other_files(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "experiments" / "base.py").write_text("from datamodules import shards\n")
    (tmp_path / "datamodules" / "shards.py").write_text("def late():\n    import webdataset\n")
    assert "webdataset" not in import_closure(tmp_path, "experiments/base.py")
    (tmp_path / "datamodules" / "shards.py").write_text("import webdataset\n")
    assert import_closure(tmp_path, "experiments/base.py")["webdataset"] == "datamodules/shards.py"


def loader_faults(source: str) -> list[str]:
    """Calls and mentions of transformers' loaders in `source`, and loaders of weights that need none of it."""
    loaders = {"from_pretrained", "from_config", "snapshot_download", "hf_hub_download", "load_state_dict_from_url"}
    tree = ast.parse(source)
    used = [(node.lineno, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used += [(node.lineno, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used += [(node.lineno, node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            used += [(node.lineno, alias.name.split(".")[-1]) for alias in node.names]
    return [f"line {line}: {name}" for line, name in used if name in loaders]


def test_one_file_alone_loads_what_is_published() -> None:
    loading = {str(f.relative_to(ROOT)): faults for f in python_files() if (faults := loader_faults(f.read_text()))}
    assert loading.keys() == {LOADER, "datamodules/checkpoints/model_folder.py"}
    assert all(
        "snapshot_download" in fault for fault in loading["datamodules/checkpoints/model_folder.py"]
    )  # files, and no more


@pytest.mark.parametrize(
    "line",
    [
        "model = AutoModel.from_pretrained(path)",
        "load = PeftModel.from_pretrained",
        "from huggingface_hub import hf_hub_download as fetch",
        "model = getattr(AutoModel, 'from_pretrained')(path)",
        "model = Auto.from_config(config)",
    ],
)
def test_a_call_that_goes_around_the_loader_is_found(line: str) -> None:
    assert loader_faults("import torch\n" + line)
    assert loader_faults("model = load_model(path)\nfrom_here = 1") == []


def test_the_loader_runs_no_code_of_a_model_and_names_the_attention() -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / LOADER).read_text())) if isinstance(node, ast.Call)]
    loads = [call for call in calls if "from_pretrained" in ast.unparse(call) or "from_config" in ast.unparse(call)]
    loads = [call for call in loads if ast.unparse(call.func) == "_loaded" or "from_" in ast.unparse(call.func)]
    assert len(loads) == 6  # model, skeleton, new model, configuration, tokenizer, processor
    for call in loads:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options["trust_remote_code"] in ("False", "trust_remote_code"), ast.unparse(call)
        if "AutoModel" in ast.unparse(call):
            assert options["attn_implementation"] in ("ATTENTION", "attention"), ast.unparse(call)
        if "AutoModel" in ast.unparse(call) and "from_pretrained" in ast.unparse(call):
            assert options["use_safetensors"] == options["output_loading_info"] == "True"


def test_only_the_loader_touches_transformers_model_classes() -> None:
    classes = ("AutoModel", "Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLPreTrainedModel")
    users = {
        str(file.relative_to(ROOT))
        for file in python_files()
        for name in imported_names(file.read_text())
        if name.startswith("transformers") and name.split(".")[-1].startswith(classes)
    }
    assert users == {LOADER}


def test_only_the_endpoint_imports_the_http_client() -> None:
    users = {
        str(file.relative_to(ROOT))
        for file in python_files()
        if {"openai", "httpx", "httpx2", "requests", "aiohttp"} & set(imported_names(file.read_text()))
    }
    assert users == {"lightning_modules/serving/openai_client.py"}


def test_only_the_masks_of_polygons_need_opencv() -> None:
    users = {str(file.relative_to(ROOT)) for file in python_files() if "cv2" in set(imported_names(file.read_text()))}
    assert users == {"datamodules/benchmarks/reading/polygons.py"}
    assert "cv2" not in import_closure(ROOT, "experiments/evaluate.py")
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    assert "opencv-python-headless" in extras["options.extras_require"]["benchmarks"]
    assert "opencv" not in extras["options"]["install_requires"]
    assert "benchmarks," in extras["options.extras_require"]["dev"]


def test_only_the_importer_of_hugging_face_data_sets_needs_their_library() -> None:
    users = {
        str(file.relative_to(ROOT)) for file in python_files() if "datasets" in set(imported_names(file.read_text()))
    }
    assert users == {"datamodules/importers/own_data/hf.py", "experiments/bench/trl_contender.py"}  # TRL asks for it
    assert "datasets" not in import_closure(ROOT, "experiments/import_shards.py")
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    assert "datasets" in extras["options.extras_require"]["hf"] and "hf]" in extras["options.extras_require"]["dev"]
    assert "datasets" not in extras["options"]["install_requires"]


def test_only_the_page_of_the_demo_needs_gradio() -> None:
    users = {
        str(file.relative_to(ROOT))
        for file in python_files()
        if any(name.split(".")[0] == "gradio" for name in imported_names(file.read_text()))
    }
    assert users == {"experiments/asking/demo_page.py"}
    assert "gradio" not in import_closure(ROOT, "experiments/asking/demo.py")
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    assert "gradio" in extras["options.extras_require"]["demo"] and "demo," in extras["options.extras_require"]["dev"]
    assert "gradio" not in extras["options"]["install_requires"]


def test_nothing_is_unpickled_from_disk() -> None:
    for file in python_files():
        text = file.read_text()
        names = set(imported_names(text))
        if str(file.relative_to(ROOT)) == PLAIN_PICKLE:
            used = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
            used = {name for name in used if name.startswith("pickle.")}
            assert used == {"pickle.Unpickler", "pickle.UnpicklingError"}
            continue
        assert names.isdisjoint({"pickle", "dill", "joblib", "cloudpickle"}), file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                assert safe and ast.unparse(safe[0]) == "True", f"{file}:{node.lineno}: needs weights_only=True"


def image_openers(source: str) -> list[str]:
    """Calls in `source` that open or decode an image file, in whatever way it was imported."""
    tree = ast.parse(source)
    found = [name for name in imported_names(source) if name.startswith("PIL.Image.")]
    found += [name for name in imported_names(source) if name.split(".")[0] in ("imageio", "skimage")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.endswith("Image.open") or node.attr in ("imread", "imdecode", "decode_image", "read_image"):
                found.append(name)
    return found


def test_only_image_loading_opens_images() -> None:
    users = {str(file.relative_to(ROOT)) for file in python_files() if image_openers(file.read_text())}
    assert users == {IMAGE_LOADING}
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / IMAGE_LOADING).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    ]
    assert len(calls) == 1 and "formats" in {keyword.arg for keyword in calls[0].keywords}


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open(file)",
        "import PIL.Image\nopener = PIL.Image.open",
        "from PIL.Image import open as read",
        "import cv2\ncv2.imread(name)",
        "import torchvision\ntorchvision.io.read_image(name)",
    ],
)
def test_an_added_way_to_open_an_image_is_found(source: str) -> None:
    assert image_openers(source)
    assert not image_openers("from PIL import Image\nImage.new('RGB', (1, 1)).save(file)\nopen(file)")
