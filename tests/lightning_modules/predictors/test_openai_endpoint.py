"""A model behind an endpoint answers questions, with refusals as outcomes."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.model_families import find_model_family
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from datamodules.samples.scores import score_text
from lightning_modules.predictors.base import UNANSWERED, Decoding
from lightning_modules.predictors.openai_endpoint import OpenAIPredictor
from lightning_modules.serving.openai_client import EndpointMisused, EndpointSettings, EndpointUnavailable
from tests.chat_server import ChatServer, http_response, question_text
from tests.conftest import random_png

TRUTH = BoxAnswer(0, (0.1, 0.2, 0.6, 0.9), "thing")
SAMPLES = [
    Sample(f"q/{k}", "test", "refer", ("a.png",), (ImagePart(0), TextPart(f"Where is thing {k}?")), TRUTH)
    for k in range(6)
]


def load(sample: Sample) -> LoadedSample:
    if sample.id == "q/4":
        raise SampleError(sample.id, "missing_image")
    return LoadedSample(sample, (random_png(random.Random(0), (90, 60)),))


def reply(request: dict) -> str | bytes:
    if "thing 2?" in question_text(request):
        return http_response(400, b'{"error": {"message": "no"}}')
    return "<ref>thing</ref><box>[[100, 200, 600, 900]]</box>"


def predictor(base_url: str, **patience) -> OpenAIPredictor:
    settings = EndpointSettings("OpenGVLab/InternVL2-8B", base_url, concurrency=2, **patience)
    return OpenAIPredictor(settings, RequestForm(find_model_family("auto", settings.model)), Decoding(128))


def test_every_sample_gets_one_reply_that_is_read_in_the_dialect() -> None:
    with ChatServer(reply) as server:
        asked = predictor(server.base_url)
        found = {sample.id: answer for sample, answer in asked.answers(SAMPLES, load)}
        sent = {(r["temperature"], r["max_completion_tokens"], "seed" in r) for r in server.requests}
    assert sent == {(0, 128, False)} and asked.box_format == BoxFormat.RELATIVE_1000
    assert sorted(found) == [sample.id for sample in SAMPLES]
    assert (found.pop("q/2").refused, found.pop("q/4").refused) == ("refused", "missing_image")
    for answer in found.values():
        assert score_text(answer.text, TRUTH, answer.image_sizes, asked.box_format).iou > 0.99
        assert answer.num_tokens == 4 and answer.finished and answer.refused is None


def test_questions_are_answered_in_a_notebook_too() -> None:
    async def cell() -> list[str]:  # a notebook runs its cells in an event loop
        answers = asked.answers(SAMPLES[:2], load)
        return [next(answers)[0].id, *(sample.id for sample, _ in answers)]

    with ChatServer(reply) as server:
        asked = predictor(server.base_url)
        assert sorted(asyncio.run(cell())) == ["q/0", "q/1"]


def test_a_server_that_takes_no_such_question_at_all_is_an_error_and_no_wrong_answers() -> None:
    with (
        ChatServer(lambda request: http_response(400, b'{"error": {"message": "text only"}}')) as server,
        pytest.raises(EndpointMisused, match=r"InternVL2-8B.*one small image.*text only"),
    ):
        list(predictor(server.base_url).answers(SAMPLES, load))


def test_a_server_is_tried_once_for_all_benchmarks_and_not_for_nothing() -> None:
    with ChatServer(reply) as server:
        asked = predictor(server.base_url)
        assert list(asked.answers([], load)) == [] and not server.requests
        for sample in SAMPLES[:2]:
            list(asked.answers([sample], load))
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("silence", "patience"),
    [(http_response(500, b"{}"), {"backoff": 0.01}), (None, {"timeout": 2.0, "attempts": 1})],
    ids=["500", "hangs"],
)
def test_a_question_without_answer_counts_as_wrong_and_ends_nothing(silence, patience, caplog) -> None:
    def without(request: dict) -> str | bytes | None:
        return silence if "thing 1?" in question_text(request) else reply(request)

    with ChatServer(without) as server:
        asked = predictor(server.base_url, **{"attempts": 2} | patience)
        found = {sample.id: answer.refused for sample, answer in asked.answers(SAMPLES, load)}
        times = sum("thing 1?" in question_text(request) for request in server.requests)
    lost = {"q/1": UNANSWERED, "q/2": "refused", "q/4": "missing_image"}
    assert found == dict.fromkeys((sample.id for sample in SAMPLES), None) | lost
    assert times == asked.settings.attempts and "counted as wrong: sample 'q/1'" in caplog.text


def test_a_server_that_dies_on_the_way_is_an_error_and_no_wrong_answers() -> None:
    def dying(request: dict) -> str | bytes:
        return http_response(503, b"{}") if len(server.requests) > 3 else reply(request)

    found = []
    with ChatServer(dying) as server:
        stream = predictor(server.base_url, attempts=2, backoff=0.01).answers(SAMPLES, load)
        with pytest.raises(EndpointUnavailable, match="2 attempts; last: 503"):
            found.extend(answer.refused for _, answer in iter(stream))
    assert UNANSWERED not in found


def test_a_caller_may_stop_early_and_errors_surface() -> None:
    with ChatServer(reply) as server:
        stream = predictor(server.base_url).answers(SAMPLES[:2], load)
        next(stream)
        stream.close()
    with (
        ChatServer(lambda request: http_response(404, b'{"error": {"message": "no such model"}}')) as server,
        pytest.raises(EndpointMisused, match=r"InternVL2-8B.*no such model"),
    ):
        list(predictor(server.base_url).answers(SAMPLES, load))


def test_identity_follows_what_answers_depend_on_and_not_the_address() -> None:
    one, other = predictor("http://a/v1"), predictor("http://b/v1")
    assert json.dumps(one.identity()) == json.dumps(other.identity())
    other.max_tokens = 5
    assert one.identity() != other.identity()
