"""Ask a model one question about your own images, and draw the boxes of its answer.

    make ask MODEL=outputs/nano/grpo/merged IMAGES="a.jpg b.jpg" QUESTION="Which object of image 1 is in image 2 too?"
    python -m experiments.asking.ask_model --images '[a.jpg]' --question "…" --model gpt-4o --endpoint.base_url https://…

Boxes are x1, y1, x2, y2 in pixels of the original image. A model that was trained here has its prompt form in its
folder. A question may define the position of each image: "In <image> there is a dog. Find it in <image>."
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.samples.sample import LoadedSample
from experiments.asking.grounding_model import GroundingModel
from experiments.asking.one_question import Answer, QuestionError, build_question, describe_boxes, draw_answer
from experiments.evaluation.evaluation_settings import AskedModel, settings_of_model
from experiments.runs.commands import command
from experiments.runs.parsers import run_cli


@dataclass(frozen=True)
class Question(AskedModel):
    """Ask a model one question about your own images.

    Args:
        model: folder or Hub name of a Qwen2.5-VL or of another image-text model; the nano model is models/nano-base.
            With an endpoint, the name of the model on the server
        images: image files, in the order in which the model sees them
        question: the text; <image> marks may define the position of each image
        target: number of the image for the answer's box, from 1; null takes the image that the thinking or the question
            names
        output: the picture with the boxes (PNG)
        json: print one JSON object instead of text
    """

    model: str
    images: list[str]
    question: str
    target: int | None = None
    output: str = "outputs/answer.png"
    json: bool = False


def ask(asked: Question) -> Answer:
    """Ask the question, and draw the boxes of the answer into the file `asked.output`. Raises QuestionError."""
    # 1. Check the images and the text before anything slow is loaded.
    loaded = build_question(asked.images, asked.question, asked.limits.max_image_pixels, asked.target)
    _check_output(asked.output)

    # 2. Load the model, with the prompt form of its training, and ask it.
    model = GroundingModel(asked.model, **settings_of_model(asked))
    answer = model.answer(loaded, asked.question, asked.target)

    # 3. Draw the boxes.
    _save_drawing(loaded, answer, asked)
    return answer


def _check_output(output: str) -> None:
    """Raises QuestionError if the picture could not be written: asking a large model takes minutes."""
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuestionError(f"output={output!r} cannot be written: {error.strerror or error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise QuestionError(f"output={output!r} cannot be written: {'a folder' if path.is_dir() else 'no permission'}")


def _save_drawing(loaded: LoadedSample, answer: Answer, asked: Question) -> None:
    path = Path(asked.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_answer(loaded.images, answer, asked.limits.max_image_pixels).save(path, "PNG")
    except OSError as error:
        raise QuestionError(f"output={asked.output!r} cannot be written: {error.strerror or error}") from error


def format_answer(answer: Answer, output: str) -> str:
    """The answer as text for a terminal."""
    lines = [f"Thinking: {answer.thinking.strip()}"] if answer.thinking else []
    lines.append(f"Answer: {(answer.answer or answer.text).strip()}")
    return "\n".join([*lines, *describe_boxes(answer), f"Drawn in {output}"])


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make ask`."""
    asked = run_cli(Question, args)
    answer = ask(asked)
    print(json.dumps(asdict(answer), ensure_ascii=False) if asked.json else format_answer(answer, asked.output))


if __name__ == "__main__":
    main()
