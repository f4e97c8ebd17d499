"""A local page that asks up to three models about your own images, side by side.

    make demo                                                   # nano: base, CoT-SFT and GRPO, as far as they exist
    make demo MODEL=outputs/kites-7b/grpo/merged ARGS="--dtype bfloat16"
    make demo MODELS="nano outputs/mine/grpo/merged"
    make demo MODEL=Qwen/Qwen2.5-VL-7B-Instruct ARGS="--endpoint.base_url http://localhost:8000/v1"

Only this machine can open the page (127.0.0.1), and the page loads nothing from other machines. Images that are dropped
on it are kept in a temporary folder, which is removed when the command ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from datamodules.persistence.user_error import UserError
from experiments.asking.grounding_model import GroundingModel
from experiments.evaluation.evaluation_settings import AskedModel, settings_of_model
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli

HOST = "127.0.0.1"
MOST_MODELS = 3  # more columns would be too narrow
TRAINED = ("outputs/nano/cot_sft/merged", "outputs/nano/grpo/merged")


class DemoError(UserError, ValueError):
    """The page cannot be opened."""


@dataclass(frozen=True)
class Demo(AskedModel):
    """Open a local page that asks models about your own images.

    Args:
        models: up to three folders or Hub names; with an endpoint, names of models on the server. null takes the nano
            base model, and the models in outputs/nano that exist
        port: port of the page on this machine
        max_images: largest number of images of a question
    """

    models: list[str] | None = None
    port: int = 7860
    max_images: int = 16


def serve(demo: Demo) -> None:
    """Load the models and serve the page until the process is interrupted. Raises DemoError and QuestionError."""
    names = demo.models or default_models()
    if len(names) > MOST_MODELS:
        raise DemoError(f"models: {len(names)} are given; the page has room for {MOST_MODELS}")
    check_port(demo.port)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the folder would stay
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        _keep_to_this_machine(folder)
        try:
            from experiments.asking.demo_page import open_page  # imports Gradio
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise DemoError("the page needs Gradio: pip install -e '.[demo]'") from error
        models = []
        for name in names:
            print(f"loading {name}", flush=True)
            models.append(GroundingModel(name, **settings_of_model(demo)))
        address = f"http://{HOST}:{demo.port}"
        open_page(
            models,
            (HOST, demo.port),
            demo.max_images,
            lambda: print(f"{address} is open for this machine; Ctrl-C ends it", flush=True),
        )


def default_models() -> list[str]:
    """The nano base model, and the models that `make pipeline`, `make sft` and `make grpo` have left."""
    return ["nano", *(folder for folder in TRAINED if (Path(folder) / "config.json").is_file())]


def check_port(port: int) -> None:
    """Raises DemoError if no page can be opened at this port."""
    if not 0 < port < 2**16:
        raise DemoError(f"port={port} must be in 1..65535")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            trial.bind((HOST, port))
        except OSError as error:
            reason = error.strerror or error
            raise DemoError(f'port={port}: {reason}. Choose another one: ARGS="--port {port % 65535 + 1}"') from error


def _keep_to_this_machine(folder: str) -> None:
    """Set the variables that Gradio reads when it is imported: no statistics, uploads in `folder`, no proxy."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "DO_NOT_TRACK": "1"}
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own page whether it is open
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make demo`."""
    serve(run_cli(Demo, args))


if __name__ == "__main__":
    main()
