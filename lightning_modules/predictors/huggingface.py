"""A predictor in this process for any image-text model in transformers: Qwen2-VL, InternVL, LLaVA-OneVision, …

The prompt and the box format are those of the model family (`datamodules/encoding/model_families.py`). The policy has
its own engine; this predictor is for models that it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from datamodules.checkpoints.pretrained import ANY_ATTENTION, load_model, load_processor
from datamodules.encoding.chat_request import ChatRequest, RequestForm, build_turn
from datamodules.metrics.predictions import Reply
from datamodules.samples.answer_text import AnswerForm
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import LoadedSample, Sample, SampleError
from datamodules.streaming.path_fingerprint import path_fingerprint
from lightning_modules.models.token_bans import end_ids
from lightning_modules.predictors.base import Decoding, Load, Show
from lightning_modules.predictors.token_stream import TokenStreamer, Watch, show_tokens
from lightning_modules.serving.generation_rules import configure, own_seed, rules


class HuggingFacePredictor:
    """Answers one question at a time.

    Args:
        model: folder or Hub name.
        form: form of the prompts.
        decoding: length and decoding rules of answers.
        device, dtype: device and data type of the weights.
        trust_remote_code: run code that comes with the weights.
    """

    chunk_size = 1

    def __init__(
        self,
        model: str,
        form: RequestForm,
        decoding: Decoding | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        self.form, self.decoding = form, decoding or Decoding()
        self.name, self.dtype = model, dtype
        self.processor = load_processor(model, trust_remote_code)
        self.model = load_model(model, getattr(torch, dtype), ANY_ATTENTION, trust_remote_code)
        self.model.to(device).eval()
        own = self.model.generation_config
        self.ends = end_ids(own, self.processor.tokenizer)
        rule, length = self.decoding.generation, self.decoding.max_new_tokens
        # A generated placeholder would count as an image without pixels.
        placeholders = {getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video")} - {None}
        self.config = configure(own, rule, length, self.ends, placeholders)
        if rule == "greedy":
            self.model.generation_config = self.config

    @property
    def box_format(self) -> BoxFormat:
        """The box format of the answers."""
        return self.form.model_family.box_format

    @property
    def answer_form(self) -> AnswerForm:
        """What an answer consists of."""
        return self.form.answer_form

    def identity(self) -> dict[str, Any]:
        """Everything that answers depend on except the question, as JSON-like data."""
        decoding = {"max_tokens": self.decoding.max_new_tokens, "dtype": self.dtype}
        decoding |= rules(self.decoding.generation)
        return {"model": self._weights_key, "form": self.form.facts(), "decoding": decoding}

    @cached_property
    def _weights_key(self) -> str:
        return path_fingerprint(self.name)  # reads all weights, so it is cached for all benchmarks

    def answers(self, samples: Sequence[Sample], load: Load) -> Iterator[tuple[Sample, Reply]]:
        """Yields one reply for each sample, in order. If `load` refuses a sample, the reply has its rule."""
        for sample in samples:
            try:
                request = build_turn(load(sample), self.form)
            except SampleError as error:
                yield sample, Reply("", (), refused=error.rule)
                continue
            with own_seed(sample.id):
                reply = self._answer(request)
            yield sample, reply

    def stream(self, loaded: LoadedSample, show: Show) -> Reply:
        """The reply to one question; `show` gets the text so far, again and again."""
        try:
            request = build_turn(loaded, self.form)
        except SampleError as error:
            return Reply("", (), refused=error.rule)
        with own_seed(loaded.sample.id):
            return self._answer(request, show_tokens(self.processor, show))

    @torch.inference_mode()
    def _answer(self, request: ChatRequest, watch: Watch | None = None) -> Reply:
        inputs = self.processor.apply_chat_template(
            request.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        self._check_sizes(request.image_sizes, inputs)
        streamer = TokenStreamer.of(self.config, watch)
        whole = self.model.generate(**inputs, generation_config=self.config, streamer=streamer)
        written = whole[0, inputs["input_ids"].shape[1] :]
        text = self.processor.decode(written, skip_special_tokens=True)
        return Reply(text, request.image_sizes, len(written), int(written[-1]) in self.ends)

    def _check_sizes(self, image_sizes: Sequence[ImageSizes], inputs: Any) -> None:
        """Check that the model sees images in the size to which its pixel boxes refer."""
        if self.box_format != BoxFormat.ABSOLUTE_PIXELS:
            return
        patch = self.processor.image_processor.patch_size
        seen = [(int(columns) * patch, int(rows) * patch) for _, rows, columns in inputs["image_grid_thw"].tolist()]
        sent = [sizes.resized for sizes in image_sizes]
        if seen != sent:
            raise ValueError(
                f"the processor of {self.name!r} resized images of {sent} to {seen}: min_pixels={self.form.min_pixels}"
                f" and max_pixels={self.form.max_pixels} must lie within its own limits"
            )
