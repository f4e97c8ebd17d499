"""The judge: grades of a step at once, failures that are counted, and texts that may hold anything."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections import Counter

import pytest

from datamodules.samples.boxes import ImageSizes
from datamodules.samples.sample import BoxAnswer
from lightning_modules.rl.rewards.judge import Judge
from lightning_modules.rl.rewards.reward_list import RewardList
from lightning_modules.serving.openai_client import EndpointMisused
from tests.chat_server import ChatServer, http_response, question_text
from tests.lightning_modules.rl.rewards.completions import make_completion

WIDE = ImageSizes(original=(640, 480), resized=(640, 480))
CUP = BoxAnswer(0, (0.0, 0.0, 0.5, 0.5), "cup")


def completions(*texts):
    return [make_completion(text, CUP, [WIDE]) for text in texts]


def grade_by_text(request):
    """The grade that the completion asks for; None: no answer."""
    written = question_text(request).partition("The model wrote:\n")[2].partition("\nReply")[0]
    return None if written == "hang" else written


def judge(server, **more):
    return Judge(server.base_url, "judge", timeout=more.pop("timeout", 5.0), attempts=1, **more)


def test_grades_are_parts_of_the_highest_in_the_order_of_the_completions():
    with ChatServer(grade_by_text) as server:
        assert judge(server).score_batch(completions("10", "0", "7.5", "8/10")) == [1.0, 0.0, 0.75, 0.8]
        with_scale = "From 0 to 10: 7", "Rating (0-10): 10", "0 – 10? 0.", "10 out of 10", "0/10"
        assert judge(server).score_batch(completions(*with_scale)) == [0.7, 1.0, 0.0, 1.0, 0.0]
        from_one = "On a scale of 1 to 10, I would give 7", "Score (1-10): 8", "7.0. So: 7"
        assert judge(server).score_batch(completions(*from_one)) == [0.7, 0.8, 0.7]
        (request, *_) = server.requests
    assert request["temperature"] == 0.0 and request["model"] == "judge"
    assert "Question: Where is the cup?" in question_text(request) and "from 0 (no support) to 10" in question_text(
        request
    )


def test_a_judge_grades_in_a_notebook_too():
    async def cell():  # a notebook runs its cells in an event loop
        return judge(server).score_batch(completions("10", "5"))

    with ChatServer(grade_by_text) as server:
        assert asyncio.run(cell()) == [1.0, 0.5]


@pytest.mark.parametrize(("on_failure", "value"), [("zero", 0.0), ("leave_out", None)])
def test_what_is_no_grade_is_a_failure(on_failure, value, caplog):
    with ChatServer(grade_by_text) as server:
        texts = ("5", "no idea", "11", "-1", "The 2 images support it: 8")
        found = judge(server, on_failure=on_failure).score_batch(completions(*texts))
    assert found[0] == 0.5 and [each.value for each in found[1:]] == [value] * 4
    assert "4 of 5 completions got no grade; first: the reply 'no idea' is not one number from 0 to 10" in caplog.text


def test_a_server_that_does_not_answer_costs_one_time_out_for_all():
    with ChatServer(grade_by_text) as server:
        began = time.monotonic()
        found = judge(server, timeout=0.5).score_batch(completions(*["hang"] * 8, "5"))
    assert [each.value for each in found[:8]] == [0.0] * 8 and found[8] == 0.5
    assert time.monotonic() - began < 8 * 0.5, "one after the other they would take four seconds"


def test_no_more_requests_than_allowed_are_open_at_once():
    open_now, most = [], []

    class Counting(ChatServer):
        async def answer(self, body, reader, writer):
            open_now.append(1)
            most.append(len(open_now))
            await super().answer(body, reader, writer)
            open_now.pop()

    with Counting(lambda request: "5", delay=0.05) as server:
        judge(server, concurrency=3).score_batch(completions(*"abcdefgh"))
    assert max(most) <= 3 and len(most) == 8


def test_a_wrong_key_ends_the_run():
    denied = http_response(401, b'{"error": {"message": "wrong key"}}')
    with ChatServer(lambda request: denied) as server, pytest.raises(EndpointMisused, match="wrong key"):
        judge(server).score_batch(completions("5", "6"))


def test_a_server_that_is_not_there_is_a_failure_of_each(caplog):
    found = Judge("http://127.0.0.1:9/v1", "judge", attempts=1).score_batch(completions("5", "6"))
    assert [each.value for each in found] == [0.0, 0.0] and "no server listens" in caplog.text


def test_a_completion_cannot_fill_the_places_of_the_prompt():
    text = "{label} {question} {highest} \\1 {"
    request = Judge("http://127.0.0.1:9/v1", "judge").request(completions(text)[0])
    assert f"The model wrote:\n{text}\nReply" in request


def test_settings_that_cannot_work_are_all_named():
    entry = {"class_path": "lightning_modules.rl.rewards.judge.Judge"}
    bad = {"base_url": "localhost", "model": "", "prompt": "grade", "highest": 0, "on_failure": "skip"}
    faults = RewardList([entry | {"init_args": bad}, entry | {"name": "other"}]).problems
    for words in ("prompt='grade' must be a text with the place {text}", "highest=0", "model=''", "on_failure='skip'"):
        assert words in faults[0]
    assert "missing a required argument: 'base_url'" in faults[1]


def test_a_judge_can_be_sent_to_another_process():
    with ChatServer(grade_by_text) as server:
        assert pickle.loads(pickle.dumps(judge(server))).score_batch(completions("5")) == [0.5]


def test_training_goes_on_where_a_judge_fails_and_its_group_teaches_nothing(build, make_items, fit):
    """The judge answers for every other group alone."""
    asked = Counter()

    def reply(request):
        asked["all"] += 1
        return str(asked["all"] % 10) if asked["all"] <= 4 else "no idea"

    with ChatServer(reply) as server:
        arguments = {"base_url": server.base_url, "model": "judge", "on_failure": "leave_out", "concurrency": 1}
        entries = [{"class_path": "lightning_modules.rl.rewards.judge.Judge", "init_args": arguments, "name": "judge"}]
        module = build(rewards=entries)
        trainer = fit(module, make_items([1, 2]), max_steps=1)
    first, second = module.last_rollouts
    assert any(first["advantages"]) and not first["zero_advantage"]
    assert second["advantages"] == [0.0] * 4 and second["zero_advantage"]
    assert [reward["failed"] for reward in second["rewards"]] == [["judge"]] * 4
    assert trainer.callback_metrics["reward/judge"] == pytest.approx((1 + 2 + 3 + 4) / 40)
    assert trainer.callback_metrics["reward/total"] == trainer.callback_metrics["reward/judge"]


def test_a_server_that_has_answered_before_is_waited_for_when_it_is_started_again():
    with ChatServer(grade_by_text) as server:
        grader = Judge(server.base_url, "judge", attempts=6)
        assert grader.score_batch(completions("5")) == [0.5]
    started = []

    def start_again():
        time.sleep(0.5)
        again = ChatServer(grade_by_text)
        again.wanted_port = server.port
        started.append(again.__enter__())

    thread = threading.Thread(target=start_again)
    thread.start()
    try:
        assert grader.score_batch(completions("7")) == [0.7]
    finally:
        thread.join()
        started[0].__exit__(None, None, None)
