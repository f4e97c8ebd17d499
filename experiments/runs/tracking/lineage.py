"""W&B artefacts with their lineage: the data of a training, the model that it made, the evaluation of this model.

    data-<fingerprint> (dataset) -> <experiment>-<phase> (model) -> <experiment>-<phase>-<benchmark> (evaluation)

An artefact is made of files that stay the same, so the same data and the same model are one version in all runs. Large
files stay where they are: a model's artefact holds its settings, not its weights. W&B accepts no inputs while it is
offline. Therefore the metadata of each artefact also name its sources, as `made_from`.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.metrics.result_files import PREDICTIONS, RESULT
from datamodules.persistence.files import fingerprint
from datamodules.persistence.message_text import first_line
from experiments.runs.run_identity import CONFIG, STARTED, read_marker

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

MOST_BYTES = 16 * 2**20  # a longer file of answers stays on this machine
Inputs = Sequence[tuple[str, str | None]]  # (path, hash of its content)


def log_training(run: wandb.Run, phase: Path, shards: Inputs) -> None:
    """Log the model of a finished phase as an output of its run, and its data as an input.

    A failure is a warning: the run is finished, and its results are on the disk.
    """
    data, model = data_facts(shards), model_facts(phase)
    _log(run, [(data, ())], (model | {"made_from": [data["name"]]}, [phase / CONFIG]))


def log_evaluations(run: wandb.Run, phase: Path, folders: Mapping[str, Path], model: str) -> None:
    """Log evaluations as outputs of a run, and their model as its input; failures as in `log_training`.

    Args:
        run: the run.
        phase: folder of the phase, or of the model's evaluations.
        folders: benchmark -> folder of its results.
        model: folder or name of the model.
    """
    source = (
        model_facts(phase) if (phase / CONFIG).is_file() else {"name": _plain(phase), "kind": "model", "model": model}
    )
    files = [phase / CONFIG] if (phase / CONFIG).is_file() else []
    for benchmark, folder in folders.items():
        facts = {"name": _plain(phase, benchmark), "kind": "evaluation", "made_from": [source["name"]]}
        result = json.loads((folder / RESULT).read_text())
        facts |= {name: result[name] for name in ("benchmark", "key", "n")}
        facts["scores"] = {name: cell["score"] for name, cell in result["averages"].items()}
        kept = [folder / RESULT, *(file for file in [folder / PREDICTIONS] if file.stat().st_size <= MOST_BYTES)]
        _log(run, [(source, files)], (facts, kept))


def data_facts(shards: Inputs) -> dict[str, Any]:
    """Name and metadata of the artefact of training data. The same content has the same name."""
    key = fingerprint([content or path for path, content in shards])
    return {"name": f"data-{key}", "kind": "dataset", "fingerprint": key, "shards": [path for path, _ in shards]}


def model_facts(phase: Path) -> dict[str, Any]:
    """Name and metadata of the artefact of a phase's model."""
    started = read_marker(phase, STARTED)
    known = {name: started[name] for name in ("key", "commit") if name in started}
    return {"name": _plain(phase), "kind": "model", **known, "folder": str(phase / "merged")}


def _plain(phase: Path, *more: str) -> str:
    """The name of an artefact: W&B allows letters, digits, "-", "_" and "."."""
    words = (*phase.resolve().parts[-2:], *more)
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in "-".join(words))[:128]


def _log(run: wandb.Run, inputs: Sequence[tuple[dict, Sequence[Path]]], output: tuple[dict, Sequence[Path]]) -> None:
    import wandb

    try:
        if not run.settings._offline:
            for facts, files in inputs:
                run.use_artifact(_artifact(facts, files))
        run.log_artifact(_artifact(*output))
    except (OSError, ValueError, TypeError, wandb.errors.Error) as error:
        log.warning("W&B has no artefact %s: %s", output[0]["name"], first_line(error))


def _artifact(facts: Mapping[str, Any], files: Sequence[Path]) -> wandb.Artifact:
    import wandb

    metadata = {name: value for name, value in facts.items() if name not in ("name", "kind")}
    artifact = wandb.Artifact(facts["name"], facts["kind"], metadata=metadata)
    # The facts that identify it are a file, too: W&B knows a version by its files.
    fixed = {name: value for name, value in metadata.items() if name in ("fingerprint", "key", "model")}
    # `new_file` of W&B would leave a temporary folder until the artefact is collected; `add_file` copies at once.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "facts.json")
        file.write_text(json.dumps(fixed))
        artifact.add_file(str(file), name=file.name)
    for path in files:
        artifact.add_file(str(path), name=path.name)
    return artifact
