"""Answers that are shown while they are decoded: the text grows, and the reply is that of `answers`."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.encoding.model_families import find_model_family
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors.base import Decoding, Predictor
from lightning_modules.predictors.huggingface import HuggingFacePredictor
from lightning_modules.predictors.openai_endpoint import OpenAIPredictor
from lightning_modules.predictors.policy import PolicyPredictor
from lightning_modules.predictors.token_stream import TokenStreamer, show_tokens
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.serving.openai_client import ChatEndpoint, EndpointSettings, EndpointUnavailable
from lightning_modules.serving.responses import read_completion
from tests.chat_server import ChatServer, completion, http_response, question_text, stream_part, streamed
from tests.conftest import QUESTIONS, random_png

SAMPLE = Sample(
    "q/0", "test", "refer", ("a.png", "b.png"), (ImagePart(0), ImagePart(1), TextPart(QUESTIONS[1])),
    BoxAnswer(1, (0.1, 0.2, 0.6, 0.9), "ring"),
)  # fmt: skip
LOADED = LoadedSample(SAMPLE, tuple(random_png(random.Random(k), (84, 56)) for k in range(2)))
TOKENS = 12


def policy_predictor(folder: str, generation: str = "greedy", static: bool | None = None) -> Predictor:
    policy = QwenVL(folder).eval()
    encoder = Encoder(folder, "absolute_pixels", "plain", 4096, TOKENS, with_target=False)
    return PolicyPredictor(policy, NativeEngine(policy, static), encoder, Decoding(TOKENS, generation=generation))


def image_text_predictor(folder: str) -> Predictor:
    return HuggingFacePredictor(
        folder, RequestForm(find_model_family("qwen2_5_vl", ""), max_pixels=28_900), Decoding(TOKENS)
    )


@pytest.mark.parametrize(
    "make",
    [
        policy_predictor,
        lambda folder: policy_predictor(folder, "model"),
        lambda folder: policy_predictor(folder, static=True),
        image_text_predictor,
    ],
    ids=["native", "generate", "static", "image_text"],
)
def test_the_text_grows_and_the_reply_is_that_of_answers(
    make: Callable[[str], Predictor], tiny_model_dir: Path
) -> None:
    predictor, texts = make(str(tiny_model_dir)), []
    reply = predictor.stream(LOADED, texts.append)
    assert reply == next(predictor.answers([SAMPLE], lambda _: LOADED))[1]
    assert texts and all(reply.text.startswith(text) for text in texts)
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)


def test_who_watches_may_end_an_answer_and_the_next_one_is_whole(tiny_model_dir: Path) -> None:
    predictor = policy_predictor(str(tiny_model_dir), static=True)
    whole = predictor.stream(LOADED, lambda text: None)

    def leave(text: str) -> None:
        raise KeyError("left")

    with pytest.raises(KeyError, match="left"):
        predictor.stream(LOADED, leave)
    assert predictor.stream(LOADED, lambda text: None) == whole


def test_a_refused_question_has_its_rule(tiny_model_dir: Path) -> None:
    broken = LoadedSample(SAMPLE, (b"no image", LOADED.images[1]))
    for predictor in (policy_predictor(str(tiny_model_dir)), image_text_predictor(str(tiny_model_dir))):
        assert predictor.stream(broken, lambda text: None).refused == "unreadable_image"


def test_only_one_completion_is_watched(make_items: Callable[..., list[EncodedSample]]) -> None:
    for items, group_size in ((make_items([1, 2]), 1), (make_items([1]), 2)):
        with pytest.raises(ValueError, match="watch is for one completion, not 2"):
            RolloutRequest(items, SamplingSettings(group_size), watch=print)


def test_half_a_character_is_left_out_and_beams_are_not_shown() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    shown: list[str] = []
    watch = show_tokens(Bytes(), shown.append)
    for end in range(1, 4):
        watch(list("aß".encode()[:end]))
    assert shown == ["a", "a", "aß"]
    config = type("Config", (), {"num_beams": 4})
    assert TokenStreamer.of(config, watch) is None


# Servers


def served(base_url: str) -> OpenAIPredictor:
    settings = EndpointSettings("OpenGVLab/InternVL2-8B", base_url, attempts=2, backoff=0.01)
    return OpenAIPredictor(settings, RequestForm(find_model_family("auto", settings.model)), Decoding(128))


def test_a_server_streams_and_the_first_part_is_there_before_the_last() -> None:
    seen, texts = threading.Event(), []

    def reply(request: dict) -> list | str:
        return streamed("<think>a", seen, "b</think>", "c") if request.get("stream") else "grey"

    def show(text: str) -> None:
        texts.append(text)
        seen.set()

    with ChatServer(reply) as server:
        found = served(server.base_url).stream(LOADED, show)
        asked = [question_text(request) for request in server.requests]
    assert texts[:3] == ["<think>a", "<think>ab</think>", "<think>ab</think>c"] and found.text == texts[-1]
    assert found.finished and len(asked) == 2 and "Which colour" in asked[0]


def ask(reply: Callable[[dict], object], texts: list[str]) -> tuple[object, dict[str, int]]:
    async def run() -> tuple[object, dict[str, int]]:
        settings = EndpointSettings("m", server.base_url, attempts=2, backoff=0.01)
        async with ChatEndpoint(settings) as endpoint:
            found = await endpoint.complete([{"role": "user", "content": []}], 8, 0.0, show=texts.append)
            return found, dict(endpoint.faults)

    with ChatServer(reply) as server:
        return asyncio.run(run())


def test_thinking_in_a_field_of_its_own_and_a_server_that_does_not_stream() -> None:
    parts = streamed("there")
    parts[1:1] = [stream_part({"reasoning_content": "why"}), stream_part({"reasoning": "?", "content": None})]
    texts: list[str] = []
    found, _ = ask(lambda request: parts, texts)
    assert texts[:3] == ["<think>why", "<think>why?", "<think>why?</think>there"]
    assert found.text == texts[-1] and found.finish_reason == "stop"
    found, _ = ask(lambda request: "whole", [])
    assert found.text == "whole"
    # cut inside the thinking: the reply is that of a request without streaming
    cut = [parts[0], stream_part({"reasoning": "why"}), stream_part({}, "length")]
    found, _ = ask(lambda request: cut, texts)
    assert texts[-1] == "<think>why" and found.text == read_completion(completion("", reasoning="why")).text


@pytest.mark.parametrize(
    "first",
    [
        streamed("half")[:-2],  # ends without a finish_reason
        [*streamed("half")[:-2], b"data: {broken\n\n"],
        [*streamed("half")[:-2], b'data: {"choices": [[]]}\n\n'],
        [*streamed("half")[:-2], stream_part({}, "abort")],
        http_response(503, b"{}"),
    ],
    ids=["cut", "json", "form", "abort", "status"],
)
def test_a_broken_stream_is_asked_again_and_counted(first: list | bytes) -> None:
    replies, texts = iter([first, streamed("whole")]), []
    found, faults = ask(lambda request: next(replies), texts)
    assert found.text == "whole" == texts[-1] and sum(faults.values()) == 1
    with pytest.raises(EndpointUnavailable):
        ask(lambda request: first, [])
