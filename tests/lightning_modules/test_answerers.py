"""A model behind an endpoint answers questions, in order, with refusals as outcomes."""

from __future__ import annotations

import random

from datamodules.chat_requests import RequestForm
from datamodules.dialects import find_dialect
from datamodules.samples import BoxAnswer, ImagePart, LoadedSample, Sample, SampleError, TextPart
from datamodules.scores import score_text
from lightning_modules.answerers import EndpointAnswerer
from lightning_modules.endpoint import EndpointSettings
from tests.chat_server import ChatServer, http_response, question_text
from tests.conftest import random_png

TRUTH = (0.1, 0.2, 0.6, 0.9)


def question(number: int) -> LoadedSample:
    parts = (ImagePart(0), TextPart(f"Where is thing {number}?"))
    sample = Sample(f"q/{number}", "test", "refer", ("a.png",), parts, BoxAnswer(0, TRUTH, "thing"))
    return LoadedSample(sample, (random_png(random.Random(number), (90, 60)),))


def test_answers_come_in_order_and_are_read_in_the_dialect() -> None:
    def reply(request: dict) -> str | bytes:
        if "thing 2?" in question_text(request):
            return http_response(400, b'{"error": {"message": "no"}}')
        return "<ref>thing</ref><box>[[100, 200, 600, 900]]</box>"

    samples, heard = [question(number) for number in range(6)], []
    with ChatServer(reply) as server:
        settings = EndpointSettings("OpenGVLab/InternVL2-8B", server.base_url, concurrency=2)
        answerer = EndpointAnswerer(settings, RequestForm(find_dialect("auto", settings.model)), max_tokens=128)
        answers = answerer.answer_all(samples, lambda index, answer: heard.append(index))
        assert {(r["temperature"], r["max_completion_tokens"], "seed" in r) for r in server.requests} == {
            (0, 128, False)
        }
    assert sorted(heard) == list(range(6))
    refused = answers.pop(2)
    assert isinstance(refused, SampleError) and (refused.sample_id, refused.rule) == ("q/2", "refused")
    for answer in answers:
        score = score_text(answer.text, BoxAnswer(0, TRUTH, "thing"), answer.geometries, answerer.convention)
        assert score.iou > 0.99
