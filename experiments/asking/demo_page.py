"""The page of `make demo`. This is the only file that imports Gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from datamodules.encoding.chat_request import png_data_url
from datamodules.samples.sample import LoadedSample
from experiments.asking.grounding_model import GroundingModel
from experiments.asking.one_question import QuestionError, build_question, draw_images
from experiments.asking.side_by_side import Shown, ask_side_by_side

TITLE = "Multi-image grounding"
HELP = (
    "Drop the images of one question in the order of their numbers. The text may name them (image 1, image 2), or say "
    "where each image stands by <image>, once for each image."
)
USERS = 8  # number of questions that are worked on at the same time; more wait in a queue
LONGEST_QUEUE = 64
LARGEST_FILE = "64mb"
KEEP_SECONDS = 3600  # uploads and drawings of an open page are removed after this time
FONTS = ("system-ui", "sans-serif")  # the fonts of the machine


def open_page(
    models: Sequence[GroundingModel], address: tuple[str, int], max_images: int, opened: Callable[[], None]
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models: a column for each.
        address: host and port.
        max_images: largest number of images of a question.
        opened: called when the page can be opened.
    """
    page = build_page(models, max_images)
    host, port = address
    # Each argument overrides an environment variable or a default that would open the page to other machines, write
    # questions down, or start other servers.
    page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=USERS).launch(
        server_name=host,
        server_port=port,
        share=False,
        root_path="",
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        inbrowser=False,
        inline=False,
        footer_links=[],
        max_file_size=LARGEST_FILE,
        theme=gr.themes.Base(font=FONTS, font_mono=("monospace",)),
        quiet=True,
        prevent_thread_lock=True,
    )
    opened()
    page.block_thread()


def build_page(models: Sequence[GroundingModel], max_images: int) -> gr.Blocks:
    """The page: images and a question above, a column for each model below."""
    most_pixels = models[0].limits.max_image_pixels

    def look(files: list[str] | None) -> list[Any]:
        return preview(files or [], most_pixels, max_images)

    def answer(files: list[str] | None, question: str | None) -> Iterator[list[Any]]:
        yield from ask(models, files or [], question or "", max_images)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(f"# {TITLE}\n{HELP}".replace("<image>", "`<image>`"))
        with gr.Row():
            files = gr.File(
                label="Images", file_count="multiple", file_types=["image"], allow_reordering=True, elem_id="images"
            )
            question = gr.Textbox(label="Question", lines=4, elem_id="question", max_length=10_000)
        numbered = gr.HTML(
            label="Numbers of the images", show_label=True, container=True, visible=False, elem_id="numbered"
        )
        button = gr.Button("Ask", variant="primary", elem_id="ask")
        message = gr.Textbox(label="Message", visible=False, interactive=False, elem_id="message")
        shown: list[gr.Blocks] = []
        with gr.Row():
            for number, model in enumerate(models, 1):
                with gr.Column():
                    gr.Textbox(model.name, label=f"Model {number}", interactive=False)
                    shown += [
                        gr.HTML(
                            label="Boxes", show_label=True, container=True, min_height=60, elem_id=f"boxes-{number}"
                        ),
                        gr.Textbox(label="Thinking", lines=4, interactive=False, elem_id=f"thinking-{number}"),
                        gr.Textbox(label="Answer", lines=4, interactive=False, elem_id=f"answer-{number}"),
                    ]
        files.change(look, files, [message, numbered], show_progress="hidden")
        gr.on(
            [button.click, question.submit],
            answer,
            [files, question],
            [message, *shown],
            concurrency_limit=USERS,
            show_progress="minimal",
        )
    return page


def preview(files: Sequence[str], max_image_pixels: int, max_images: int) -> list[Any]:
    """The values of the message and of the picture with the numbered images, before a question is asked."""
    if not files:
        return [_message(""), gr.update(value="", visible=False)]
    try:
        loaded = check(files, "-", max_image_pixels, max_images)
    except QuestionError as error:
        return [_message(str(error)), gr.update(value="", visible=False)]
    picture = _picture(draw_images(loaded.images, max_image_pixels), "the images with their numbers", "14em")
    return [_message(""), gr.update(value=picture, visible=True)]


def ask(models: Sequence[GroundingModel], files: Sequence[str], question: str, max_images: int) -> Iterator[list[Any]]:
    """Yields the values of the message and of all columns, again and again."""
    try:
        loaded = check(files, question, models[0].limits.max_image_pixels, max_images)
    except QuestionError as error:
        yield [_message(str(error)), *_column(Shown("", "")) * len(models)]
        return
    before: Sequence[Shown | None] = [None] * len(models)
    for shown in ask_side_by_side(models, loaded, question):
        columns = [_column(new) if new is not old else [gr.skip()] * 3 for new, old in zip(shown, before, strict=True)]
        yield [_message(""), *(value for column in columns for value in column)]
        before = shown


def check(files: Sequence[str], question: str, max_image_pixels: int, max_images: int) -> LoadedSample:
    """The question as a sample. Raises QuestionError, whose message has the names of the files as users know them."""
    if len(files) > max_images:
        raise QuestionError(f"{len(files)} images are too many: a question has at most {max_images}")
    try:
        return build_question(files, question, max_image_pixels)
    except QuestionError as error:
        text = str(error)
        for file in files:  # without the temporary folder of an upload
            text = text.replace(file, Path(file).name)
        raise QuestionError(text) from error


def _message(text: str) -> Any:
    return gr.update(value=text, visible=bool(text))


def _column(shown: Shown) -> list[Any]:
    """The values of the fields of one model."""
    words = "the images with the boxes of the answer"
    picture = "" if shown.drawing is None else _picture(shown.drawing, words, "24em")
    return [picture, shown.thinking, shown.answer]


def _picture(drawing: Image.Image, words: str, height: str) -> str:
    """A picture as HTML that holds its data.

    Gradio would write it to a file whose name is a hash of the pixels. One user's file would be written again while
    another user with the same images reads it.
    """
    style = f"max-width: 100%; max-height: {height}; object-fit: contain"
    return f'<img src="{png_data_url(drawing)}" alt="{words}" style="{style}">'
