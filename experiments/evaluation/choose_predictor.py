"""Which `Predictor` a model means: the policy's family, any other image-text model here, or one behind a server."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from callbacks.evaluation import EvaluationSettings
from datamodules.checkpoints.model_folder import MODEL_TYPE, check_image_text_model, read_model_type
from datamodules.checkpoints.pretrained import ANY_ATTENTION, check_policy, check_tensors
from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.messages import PromptStyle
from datamodules.encoding.model_families import find_model_family
from datamodules.images.image_loading import MAX_IMAGE_PIXELS, MAX_SAMPLE_PIXELS
from datamodules.predictors import Predictor
from datamodules.samples.boxes import BoxFormat
from experiments.runs import run_identity
from lightning_modules.serving.generation_rules import Generation, stating
from lightning_modules.serving.openai_client import EndpointSettings

if TYPE_CHECKING:
    from lightning_modules.models.qwen_vl import QwenVL
    from lightning_modules.rollouts.base import RolloutEngine

ALIASES = {"nano": "models/nano-base"}


@dataclass(frozen=True)
class ModelOptions:
    """How a model is to be asked, as the user says it; `evaluate_benchmarks` explains each field."""

    box_format: str = "absolute_pixels"
    style: str = "auto"
    model_family: str = "auto"
    before_image: str | None = None
    label_images: bool = False
    max_prompt_tokens: int = 16_384
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_sample_pixels: int = MAX_SAMPLE_PIXELS
    max_resized_pixels: int | None = None
    as_trained: bool = True
    dtype: str = "float32"
    device: str = "auto"
    decoding: EvaluationSettings = field(default_factory=EvaluationSettings)
    trust_remote_code: bool = False
    generation: Generation = "greedy"


# All that makes a predictor. Settings cross to other processes, which make their own.


@dataclass(frozen=True)
class PolicySettings:
    """A Qwen2.5-VL in this process, asked by the engine that it is trained with."""

    model: str
    box_format: str
    style: str
    dtype: str
    device: str
    decoding: EvaluationSettings
    limits: dict[str, Any]  # of `Encoder`: max_prompt_tokens, label_images, …
    generation: Generation = "greedy"


@dataclass(frozen=True)
class ImageTextSettings:
    """Any other image-text model in this process."""

    model: str
    form: RequestForm
    max_tokens: int
    dtype: str
    device: str
    trust_remote_code: bool
    generation: Generation = "greedy"


@dataclass(frozen=True)
class ServedSettings:
    """A model behind an OpenAI-compatible server. One process asks, with the endpoint's own concurrency."""

    endpoint: EndpointSettings
    form: RequestForm
    max_tokens: int
    generation: Generation = "greedy"

    @property
    def model(self) -> str:
        return self.endpoint.model


PredictorSettings = PolicySettings | ImageTextSettings | ServedSettings


def choose_predictor(model: str, endpoint: EndpointSettings | None, options: ModelOptions) -> PredictorSettings:
    """What `model` and the options mean, checked as far as it goes without weights and without asking the server.

    Raises ValueError that names each wrong field.
    """
    max_tokens = options.decoding.max_new_tokens
    if endpoint is not None:
        if endpoint.base_url is None:
            raise ValueError("endpoint.base_url=None: a model behind a server needs its address")
        if endpoint.model not in ("", model):
            raise ValueError(f"endpoint.model={endpoint.model!r} and model={model!r} must be one: leave out the former")
        stating(endpoint, options.generation)  # raises where extra_body contradicts it
        return ServedSettings(replace(endpoint, model=model), _form(options, model), max_tokens, options.generation)
    found = read_model_type(model)
    if found == MODEL_TYPE:
        return _policy_settings(model, options)
    check_image_text_model(model, options.trust_remote_code)
    if not options.trust_remote_code:  # a model's own code may not know the meta device
        check_tensors(model, ANY_ATTENTION)
    form = _form(options, found, model)
    how = (options.dtype, options.device, options.trust_remote_code, options.generation)
    return ImageTextSettings(model, form, max_tokens, *how)


def make_predictor(settings: PredictorSettings, rank: int = 0) -> Predictor:
    """The predictor of this process; `rank` takes its own GPU where there are several.

    Each kind imports what it needs: who asks a server waits for no model classes.
    """
    if isinstance(settings, ServedSettings):
        from lightning_modules.predictors.openai_endpoint import OpenAIPredictor

        return OpenAIPredictor(settings.endpoint, settings.form, settings.max_tokens, settings.generation)
    device = choose_device(settings.device, rank)
    if isinstance(settings, ImageTextSettings):
        from lightning_modules.predictors.huggingface import HuggingFacePredictor

        how = (settings.max_tokens, device, settings.dtype, settings.trust_remote_code, settings.generation)
        return HuggingFacePredictor(settings.model, settings.form, *how)
    return _make_policy(settings, device)


def _make_policy(settings: PolicySettings, device: str) -> Predictor:
    from callbacks.policy_predictor import PolicyPredictor
    from datamodules.encoding.encoder import Encoder
    from lightning_modules.models.qwen_vl import QwenVL

    encoder = Encoder(
        settings.model,
        box_format=BoxFormat(settings.box_format),
        style=PromptStyle(settings.style),
        with_target=False,
        max_completion_tokens=settings.decoding.max_new_tokens,
        **settings.limits,
    )
    policy = QwenVL(settings.model, dtype=settings.dtype).to(device).eval()
    engine = make_engine(policy, settings.generation)
    return PolicyPredictor(policy, engine, encoder, settings.decoding, settings.generation)


def make_engine(policy: QwenVL, generation: Generation) -> RolloutEngine:
    """Who answers for a Qwen2.5-VL in this process."""
    if generation == "model":
        from lightning_modules.predictors.own_generation import OwnGeneration

        return OwnGeneration(policy)
    from lightning_modules.rollouts.base import NativeEngine

    return NativeEngine(policy)


def _policy_settings(model: str, options: ModelOptions) -> PolicySettings:
    check_policy(model)
    faults = [
        f"{name}={value!r} is for other models; {model!r} is a Qwen2.5-VL: box format, style and label_images"
        for name, value, default in (
            ("model_family", options.model_family, "auto"),
            ("before_image", options.before_image, None),
        )
        if value != default
    ]
    if options.style == "native":
        faults.append("style='native' is a model family's own prompt, for other models than Qwen2.5-VL")
    if faults:
        raise ValueError("; ".join(faults))
    form = {"box_format": options.box_format, "style": "think" if options.style == "auto" else options.style}
    form |= {"max_resized_pixels": options.max_resized_pixels, "label_images": options.label_images}
    form |= run_identity.trained_form(model, form) if options.as_trained else {}
    bounds = {"max_prompt_tokens": options.max_prompt_tokens, "max_image_pixels": options.max_image_pixels}
    bounds |= {"max_sample_pixels": options.max_sample_pixels}
    box_format, style = form.pop("box_format"), form.pop("style")
    how = (options.dtype, options.device, options.decoding, form | bounds, options.generation)
    return PolicySettings(model, box_format, style, *how)


def _form(options: ModelOptions, *names: str) -> RequestForm:
    """The prompt form of another model; `names` say which family it is of."""
    if options.box_format != "absolute_pixels":
        raise ValueError(
            f"box_format={options.box_format!r} is for Qwen2.5-VL; other models have theirs from model_family"
        )
    model_family = find_model_family(options.model_family, *names)
    style = "native" if options.style == "auto" else options.style
    sizes = {"max_image_pixels": options.max_image_pixels, "max_sample_pixels": options.max_sample_pixels}
    if options.max_resized_pixels is not None:
        sizes["max_pixels"] = options.max_resized_pixels
    return RequestForm(model_family, style, options.before_image, **sizes)


def choose_device(device: str, rank: int) -> str:
    """ "auto" and "cuda" spread processes over the GPUs."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
