"""The settings of an evaluation, grouped by concern. This module imports no model classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.samples.boxes import BoxFormatName
from experiments.runs.parsers import run_cli
from experiments.runs.renamed_settings import RENAMED, refuse_moved
from lightning_modules.predictors.base import Decoding
from lightning_modules.serving.openai_client import EndpointSettings

PHASE_FOLDER = "benchmarks"  # folder of a phase for the results of its merged model
Style = Literal["auto", "think", "answer", "plain", "official", "native"]
# Settings that an earlier version had at the top level -> their new place.
MOVED = {
    **dict.fromkeys(("annotations", "image_root"), "data_root, the folder that holds MIG-Bench/"),
    **{name: f"form.{name}" for name in ("style", "box_format", "label_images", "max_resized_pixels")},
    **{name: f"form.{name}" for name in ("model_family", "before_image", "as_trained")},
    **{name: f"limits.{name}" for name in ("max_prompt_tokens", "max_image_pixels", "max_sample_pixels")},
    "generation": "decoding.generation",
}


@dataclass(frozen=True)
class QuestionForm:
    """The form of the prompts, and the format of the boxes in the answers.

    Args:
        style: auto means think for a Qwen2.5-VL, and native (the prompt of the model family) for other models
        box_format: box format of a Qwen2.5-VL, or of another model of a family that can be trained
        label_images: write "Picture k: " before image k, for a Qwen2.5-VL
        max_resized_pixels: larger images are shrunk to this number of pixels, if it is less than the processor's own
            limit (for a served Qwen2.5-VL it must not be above that limit)
        model_family: prompt and box format of a model other than Qwen2.5-VL (datamodules/encoding/model_families.py);
            auto finds it by model_type and name
        before_image: text before image k for other models, instead of the text of the model family, such as "Picture
            {}: "
        answer_form: named_image asks for the number of each box's image, and reads it (in a folder of shards; a
            published benchmark has no image in its measure). Questions with several boxes ask for it in any case
        as_trained: use the prompt form of the phase for its merged model, local or on a server that names the model by
            its folder; this overrides box_format, style, max_resized_pixels, label_images and answer_form
    """

    style: Style = "auto"
    box_format: BoxFormatName = "absolute_pixels"
    label_images: bool = False
    max_resized_pixels: int | None = None
    model_family: str = "auto"
    before_image: str | None = None
    answer_form: Literal["one_box", "named_image"] = "one_box"
    as_trained: bool = True


@dataclass(frozen=True)
class QuestionLimits:
    """A question beyond one of these limits counts as wrong.

    Args:
        max_prompt_tokens: largest number of tokens of a prompt, for a Qwen2.5-VL
        max_image_pixels: largest number of pixels of an image (decompression bombs)
        max_sample_pixels: largest number of pixels of all images of a question together
    """

    max_prompt_tokens: int = 16_384
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_sample_pixels: int = MAX_SAMPLE_PIXELS


@dataclass(frozen=True, kw_only=True)
class AskedModel:
    """How a model is loaded and asked: shared by evaluation, `make ask` and the demo.

    Args:
        form: form of the prompts, for a model that was not trained here
        limits: a question beyond these limits is not asked, and counts as wrong
        decoding: decoding of the answers
        dtype: data type of the weights
        device: auto, cpu, cuda (each process takes its own GPU), cuda:1, ...
        trust_remote_code: run code that comes with a model's weights
        endpoint: an OpenAI-compatible server, by base_url; its model is named by the command
    """

    form: QuestionForm = field(default_factory=QuestionForm)
    limits: QuestionLimits = field(default_factory=QuestionLimits)
    decoding: Decoding = field(default_factory=Decoding)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    endpoint: EndpointSettings | None = None


def settings_of_model(asked: AskedModel) -> dict[str, Any]:
    """The settings of AskedModel by name, without those that a subclass adds.

    A function, because jsonargparse takes methods of a dataclass for subcommands.
    """
    return {each.name: getattr(asked, each.name) for each in fields(AskedModel)}


@dataclass(frozen=True)
class Evaluation(AskedModel):
    """Evaluate a model on the paper's benchmarks.

    Args:
        model: folder or Hub name of a Qwen2.5-VL without an adapter (merge first), or of any image-text model that
            transformers can load; the nano model is models/nano-base. With an endpoint, the name of the model on the
            server
        data_root: folder that holds MIG-Bench/, Ref-L4/, ReasonSeg/, ReVOS/, odinw/, BLINK/, MMIU/, MC-Bench/
        bench: all (the seven of the paper's tables), or a comma-separated list of mig_bench, ref_l4, lisa, revos,
            odinw, blink, mmiu, mc_bench; a path, such as data/kites/val, is a folder of shards, and its tasks are the
            columns
        output: output folder; null means <phase>/benchmarks for the merged model of a phase (finished results with
            other settings are not replaced), and outputs/eval/<model> for another model
        limit: largest number of questions of each column (task, split, set or subset); null means all
        replicas: write nano replicas of missing benchmarks into data_root
        processes: number of processes that share the questions; answers do not depend on it. A single process asks an
            endpoint, with the concurrency of the endpoint
        extractor: an OpenAI-compatible server, by base_url and model, that finds the chosen option in an answer of
            BLINK or MMIU if the official parser finds no letter; it affects only official columns, and its replies are
            stored
        redo: ask again, and do not use answers from other source files of the project
        keep: use answers from other source files of the project
        check_without: only check the settings, and read nothing from these paths, which are still to be made
    """

    model: str
    data_root: str
    bench: str = "mig_bench"
    output: str | None = None
    limit: int | None = None
    replicas: bool = False
    processes: int = 1
    extractor: EndpointSettings | None = None
    redo: bool = False
    keep: bool = False
    check_without: list[str] | None = None


def read_settings(config: str, more: Sequence[str] = ()) -> Evaluation:
    """The settings from a YAML and further arguments, as on the command line.

    Ends the program if a setting is wrong or has an old name.
    """
    arguments = ["--config", config, *more]
    refuse_moved(arguments, RENAMED | MOVED)
    return run_cli(Evaluation, arguments)
