"""Publish a trained model on the Hugging Face Hub: the merged folder with its card, and the adapter beside it.

    make publish MODEL=outputs/nano/grpo/merged REPO=owner/name
    python -m experiments.runs.sharing.publish --model outputs/nano/grpo/merged --repo owner/name --private true

The key is the Hub's own: `hf auth login`, or the environment variable HF_TOKEN. The same command again uploads only
the files that differ. Weights and the adapter of another model that was published there before are deleted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from datamodules.checkpoints.model_folder import ADAPTER, CONFIG, local_folder
from datamodules.persistence.user_error import UserError
from experiments.runs import run_identity
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli
from experiments.runs.sharing.model_card import CARD, write_model_card
from experiments.runs.sharing.public_settings import public

ADAPTER_FOLDER = "adapter"  # folder of the adapter in a phase and in the repository
# Files of an earlier model that would be loaded in place of this model's, or beside them, where it has no such files.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "prompt_form.json")


class PublishError(UserError):
    """The model cannot be published. The message has the reason and the fix."""


@dataclass(frozen=True)
class Publication:
    """Publish a trained model on the Hugging Face Hub.

    Args:
        model: the merged model of a phase, such as outputs/nano/grpo/merged
        repo: owner/name on the Hub; it is created if it does not exist
        private: create it as a private repository
        license_name: the Hub's name of the licence of the base model, such as apache-2.0, for the card
        message: message of the commit
    """

    model: str
    repo: str
    private: bool = False
    license_name: str | None = None
    message: str = "Upload the model and its card"


def publish(publication: Publication) -> str:
    """Write the card and upload everything; returns the address of the commit.

    Raises:
        PublishError: the folder is not a merged model of a phase, there is no key, or the Hub refuses.
    """
    # 1. Check the names, the folder and its phase before anything is uploaded.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", publication.repo):
        raise PublishError(f"repo={publication.repo!r} must be owner/name")
    folder = local_folder(publication.model)
    phase = folder.resolve().parent
    if folder.name != "merged" or not (folder / CONFIG).is_file() or not (phase / run_identity.CONFIG).is_file():
        raise PublishError(
            f"model={publication.model!r} is not the merged folder of a phase, such as outputs/nano/grpo/merged: its "
            "card needs the config.yaml beside it"
        )
    adapter = phase / ADAPTER_FOLDER
    card = write_model_card(phase, publication.license_name)

    # 2. The repository.
    from huggingface_hub import HfApi, get_token  # a slow import, needed only for the Hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if get_token() is None:
        raise PublishError("no key for the Hub: run `hf auth login`, or set the environment variable HF_TOKEN")
    hub = HfApi()
    try:
        hub.create_repo(publication.repo, private=publication.private, exist_ok=True)
        # 3. The merged model with its card, then the adapter.
        commit = hub.upload_folder(
            repo_id=publication.repo,
            folder_path=folder,
            commit_message=publication.message,
            delete_patterns=[*WEIGHTS, *([] if adapter.is_dir() else [f"{ADAPTER_FOLDER}/*"])],
        )
        if adapter.is_dir():
            with _public_adapter(adapter) as copy:
                commit = hub.upload_folder(
                    repo_id=publication.repo,
                    folder_path=copy,
                    path_in_repo=ADAPTER_FOLDER,
                    commit_message=f"{publication.message}: adapter",
                )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PublishError(
            f"repo={publication.repo!r} at {hub.endpoint}: {first}. Nothing local has changed but {card}"
        ) from error
    return str(commit.commit_url)


@contextmanager
def _public_adapter(adapter: Path) -> Iterator[Path]:
    """A copy of the adapter's folder whose configuration names no private path of the base model."""
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(adapter, Path(folder) / ADAPTER_FOLDER))
        settings = json.loads((copy / ADAPTER).read_text())
        settings["base_model_name_or_path"] = public(settings.get("base_model_name_or_path"))
        (copy / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n")
        yield copy


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make publish`."""
    publication = run_cli(Publication, args)
    address = publish(publication)
    print(f"card: {Path(publication.model) / CARD}\npublished: {address}")


if __name__ == "__main__":
    main()
