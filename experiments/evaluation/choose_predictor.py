"""Choose the `Predictor`: for a model of the policy's family, another local image-text model, or a served model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from datamodules.checkpoints.model_folder import check_image_text_model, read_model_type
from datamodules.checkpoints.pretrained import ANY_ATTENTION, check_policy, check_tensors
from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.messages import PromptStyle
from datamodules.encoding.model_families import find_model_family
from datamodules.encoding.prompt_form import form_as_trained, read_prompt_form
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat
from experiments.evaluation.evaluation_settings import AskedModel, QuestionForm
from experiments.evaluation.trained_form import trained_form
from lightning_modules.models.architectures.registry import known_types
from lightning_modules.predictors.base import Decoding, Predictor
from lightning_modules.serving.generation_rules import stating
from lightning_modules.serving.openai_client import EndpointSettings

ALIASES = {"nano": "models/nano-base"}


# The settings of a predictor. They are sent to other processes, and each process makes its own predictor.


@dataclass(frozen=True)
class PolicySettings:
    """A model of a family that can be trained (Qwen2.5-VL).

    It runs in this process with the rollout engine of training. `prompts` are arguments of `Encoder`: box_format,
    style, max_prompt_tokens, …
    """

    model: str
    prompts: dict[str, Any]
    decoding: Decoding
    dtype: str
    device: str


@dataclass(frozen=True)
class ImageTextSettings:
    """Any other image-text model in this process."""

    model: str
    form: RequestForm
    decoding: Decoding
    dtype: str
    device: str
    trust_remote_code: bool


@dataclass(frozen=True)
class ServedSettings:
    """A model on an OpenAI-compatible server. A single process asks it, with the concurrency of the endpoint."""

    endpoint: EndpointSettings
    form: RequestForm
    decoding: Decoding

    @property
    def model(self) -> str:
        """The name of the model on the server."""
        return self.endpoint.model


PredictorSettings = PolicySettings | ImageTextSettings | ServedSettings


def choose_predictor(model: str, asked: AskedModel) -> PredictorSettings:
    """Choose the predictor's settings, and check them as far as possible without weights and without the server.

    Args:
        model: folder or Hub name, or an alias such as "nano"; with an endpoint, the name of the model on the server.
        asked: how the model is loaded and asked.

    Raises ValueError that names each wrong field.
    """
    # 1. A served model: it has no files here.
    if asked.endpoint is not None:
        return _served_settings(model, asked, asked.endpoint)
    check_device(asked.device)
    # 2. A model of a family that can be trained, known by the model_type in its config.json.
    model = ALIASES.get(model, model)
    found = read_model_type(model)
    if found in known_types():
        return _policy_settings(model, found, asked)
    # 3. Any other image-text model that transformers can load.
    check_image_text_model(model, asked.trust_remote_code)
    if not asked.trust_remote_code:  # custom code of a model may not support the meta device
        check_tensors(model, ANY_ATTENTION)
    form = _request_form(asked, found, model)
    return ImageTextSettings(model, form, asked.decoding, asked.dtype, asked.device, asked.trust_remote_code)


def make_predictor(settings: PredictorSettings, rank: int = 0) -> Predictor:
    """Make the predictor of this process. If there are several GPUs, each `rank` takes its own.

    Imports are local, so that asking a server does not wait for the import of transformers.
    """
    if isinstance(settings, ServedSettings):
        from lightning_modules.predictors.openai_endpoint import OpenAIPredictor

        return OpenAIPredictor(settings.endpoint, settings.form, settings.decoding)
    device = choose_device(settings.device, rank)
    if isinstance(settings, ImageTextSettings):
        from lightning_modules.predictors.huggingface import HuggingFacePredictor

        how = (settings.decoding, device, settings.dtype, settings.trust_remote_code)
        return HuggingFacePredictor(settings.model, settings.form, *how)
    return _make_policy(settings, device)


def _make_policy(settings: PolicySettings, device: str) -> Predictor:
    from datamodules.encoding.encoder import Encoder
    from lightning_modules.models.qwen_vl import QwenVL
    from lightning_modules.predictors.policy import PolicyPredictor
    from lightning_modules.rollouts.native.engine import NativeEngine

    length = settings.decoding.max_new_tokens
    encoder = Encoder(settings.model, with_target=False, max_completion_tokens=length, **settings.prompts)
    policy = QwenVL(settings.model, dtype=settings.dtype).to(device).eval()
    return PolicyPredictor(policy, NativeEngine(policy), encoder, settings.decoding)


def _served_settings(model: str, asked: AskedModel, endpoint: EndpointSettings) -> ServedSettings:
    if endpoint.base_url is None:
        raise ValueError("endpoint.base_url=None: a model behind a server needs its address")
    # With two names, it would be unclear which model is asked.
    if endpoint.model not in ("", model):
        raise ValueError(f"endpoint.model={endpoint.model!r} and model={model!r} differ: leave out the first")
    stating(endpoint, asked.decoding.generation)  # raises an error if extra_body contradicts it
    form = _served_form(model, asked)
    return ServedSettings(replace(endpoint, model=model), form, asked.decoding)


def _served_form(model: str, asked: AskedModel) -> RequestForm:
    """The prompt form of a served model.

    The name on the server may be the folder of a model that was trained here (as with vLLM). Then the prompt form of
    its training is used.
    """
    trained = read_prompt_form(model) if asked.form.as_trained and Path(model).is_dir() else None
    if trained is None:
        return _request_form(asked, model)
    form = _request_form(asked, "qwen2_5_vl")
    return form_as_trained(form, trained, model, "--form.as_trained")


def _policy_settings(model: str, model_type: str, asked: AskedModel) -> PolicySettings:
    """The settings for a model of a family that can be trained; `model_type` comes from its config.json."""
    check_policy(model, known_types())
    form, default = asked.form, QuestionForm()
    # 1. Refuse settings that belong to other models.
    name = known_types()[model_type]
    problems = [
        f"form.{field}={getattr(form, field)!r} is for other models; {model!r} is a {name}: box format, style and "
        "label_images"
        for field in ("model_family", "before_image")
        if getattr(form, field) != getattr(default, field)
    ]
    if form.style == "native":
        problems.append(f"form.style='native' is a model family's own prompt, for other models than {name}")
    # 2. The prompt form: from the YAML, or from the training of the model.
    prompts = {"box_format": form.box_format, "style": "think" if form.style == "auto" else form.style}
    prompts |= {"max_resized_pixels": form.max_resized_pixels, "label_images": form.label_images}
    prompts |= {"answer_form": form.answer_form}
    trained = trained_form(model, prompts) if form.as_trained else {}
    # 3. A model that was not trained here writes boxes in the format of its family. With the default format of the
    # settings, its boxes could be read wrongly and count as wrong answers.
    written = find_model_family("auto", model_type).box_format
    if "box_format" not in trained and form.box_format == default.box_format != written:
        problems.append(
            f"form.box_format={form.box_format!r}: {model!r} is a {name}, which writes boxes as {written} "
            f"(datamodules/encoding/model_families.py); set form.box_format={written}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    prompts |= trained
    prompts |= {"box_format": BoxFormat(prompts["box_format"]), "style": PromptStyle(prompts["style"])}
    prompts |= {"answer_form": AnswerForm(prompts["answer_form"])}
    return PolicySettings(model, prompts | asdict(asked.limits), asked.decoding, asked.dtype, asked.device)


def _request_form(asked: AskedModel, *names: str) -> RequestForm:
    """The prompt form of another model; its family is found from `names`."""
    form = asked.form
    if form.box_format != "absolute_pixels":
        raise ValueError(
            f"form.box_format={form.box_format!r} is for Qwen2.5-VL; other models have theirs from form.model_family"
        )
    model_family = find_model_family(form.model_family, *names)
    style = "native" if form.style == "auto" else form.style
    sizes = {name: getattr(asked.limits, name) for name in ("max_image_pixels", "max_sample_pixels")}
    if form.max_resized_pixels is not None:
        sizes["max_pixels"] = form.max_resized_pixels
    return RequestForm(model_family, style, form.before_image, **sizes, answer_form=AnswerForm(form.answer_form))


def check_device(device: str) -> None:
    """Raise ValueError for a device that PyTorch does not know or that does not exist here."""
    try:
        found = torch.device("cpu" if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: PyTorch finds {torch.cuda.device_count()} GPUs here. Use --device=cpu")


def choose_device(device: str, rank: int) -> str:
    """The device of one process: "auto" and "cuda" distribute processes over the GPUs. Call `check_device` first."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
