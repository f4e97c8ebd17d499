"""The settings of an evaluation, grouped by concern. Reading them loads no model classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.samples.boxes import BoxFormatName
from experiments.runs.parsers import run_cli
from experiments.runs.renamed_settings import RENAMED, refuse_moved
from lightning_modules.predictors.base import Decoding
from lightning_modules.serving.openai_client import EndpointSettings

PHASE_FOLDER = "benchmarks"  # of a phase: the results of its merged model
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
    """How questions are put to the model, and how the boxes in its answers are read.

    Args:
        style: auto: think, for other models than Qwen2.5-VL native, which is their model family's own prompt
        box_format: how a Qwen2.5-VL writes boxes, or another model of a family that can be trained
        label_images: write "Picture k: " before image k, for a Qwen2.5-VL
        max_resized_pixels: larger images are shrunk to this number of pixels, if it is less than the processor's own
            limit (for a served Qwen2.5-VL it must not be above that limit)
        model_family: how another model than Qwen2.5-VL is asked for boxes and writes them
            (datamodules/encoding/model_families.py); auto: by model_type and name
        before_image: text before image k for other models instead of the model family's, such as "Picture {}: "
        as_trained: put questions to a phase's merged model as that phase did, here or behind a server that names the
            model by its folder, whatever box_format, style, max_resized_pixels and label_images say
    """

    style: Style = "auto"
    box_format: BoxFormatName = "absolute_pixels"
    label_images: bool = False
    max_resized_pixels: int | None = None
    model_family: str = "auto"
    before_image: str | None = None
    as_trained: bool = True


@dataclass(frozen=True)
class QuestionLimits:
    """A question beyond one of these limits counts as wrong.

    Args:
        max_prompt_tokens: tokens of a prompt, for a Qwen2.5-VL
        max_image_pixels: pixels of an image (decompression bombs)
        max_sample_pixels: pixels of all images of a question together
    """

    max_prompt_tokens: int = 16_384
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_sample_pixels: int = MAX_SAMPLE_PIXELS


@dataclass(frozen=True)
class Evaluation:
    """Evaluate a model on the paper's benchmarks.

    Args:
        model: folder or Hub name of a Qwen2.5-VL without an adapter (merge first), or of any image-text model that
            transformers loads; nano: models/nano-base. With an endpoint, the server's name of it
        data_root: folder that holds MIG-Bench/, Ref-L4/, ReasonSeg/, ReVOS/, odinw/, BLINK/, MMIU/
        bench: all, or some of mig_bench, ref_l4, lisa, revos, odinw, blink, mmiu with commas between; a path, such as
            data/kites/val, is a folder of shards, whose tasks are the columns
        output: null: <phase>/benchmarks for the merged model of a phase, where no finished result of other settings is
            replaced; for another model outputs/eval/<model>
        limit: the most questions that are asked of each column (task, split, set or subset); null: all
        replicas: write the benchmarks' nano replicas into data_root where they are missing
        form: how questions are put
        limits: which questions count as wrong without being put
        decoding: how answers are decoded
        dtype: of the weights
        device: auto, cpu, cuda (each process takes its own GPU), cuda:1, ...
        processes: number of processes that share the questions; answers do not depend on it. An endpoint is asked by
            one process, with the endpoint's concurrency
        trust_remote_code: run code that comes with a model's weights
        endpoint: an OpenAI-compatible server, by base_url; its model is the one above
        extractor: an OpenAI-compatible server, by base_url and model, that says which option an answer of BLINK or MMIU
            picks where the official reader finds no letter; official columns only, replies are kept
        redo: ask the questions again that other source files of the project have asked
        keep: take the answers that other source files of the project have got
    """

    model: str
    data_root: str
    bench: str = "mig_bench"
    output: str | None = None
    limit: int | None = None
    replicas: bool = False
    form: QuestionForm = field(default_factory=QuestionForm)
    limits: QuestionLimits = field(default_factory=QuestionLimits)
    decoding: Decoding = field(default_factory=Decoding)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    processes: int = 1
    trust_remote_code: bool = False
    endpoint: EndpointSettings | None = None
    extractor: EndpointSettings | None = None
    redo: bool = False
    keep: bool = False


def read_settings(config: str, more: Sequence[str] = ()) -> Evaluation:
    """The settings of a YAML with further arguments, as the command reads them. Ends the program where some are wrong,
    or have an old name."""
    arguments = ["--config", config, *more]
    refuse_moved(arguments, RENAMED | MOVED)
    return run_cli(Evaluation, arguments)
