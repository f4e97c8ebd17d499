"""What a server can do wrong, and what becomes of the run: the served engine against a stub that misbehaves."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from datamodules.persistence.files import StorageError
from datamodules.persistence.user_error import UserError
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.vllm.engine import AdapterNotGiven
from lightning_modules.rollouts.vllm.server_checks import PromptMismatch
from lightning_modules.rollouts.vllm.server_pool import ServerPool, ServersLost
from lightning_modules.serving.openai_client import (
    EndpointMisused,
    EndpointSettings,
    EndpointUnavailable,
    RequestRefused,
)
from tests.vllm_stub import error, wait_for

SAMPLING = SamplingSettings(group_size=3, temperature=0.8, max_new_tokens=6)


class Spoiled:
    """Spoils the first `times` answers to requests whose path ends in `path`, and counts them all."""

    def __init__(self, path: str, spoil: Callable[[Callable[[], Any]], tuple[int, Any]], times: int = 1) -> None:
        self.path, self.spoil, self.times, self.seen = path, spoil, times, 0

    def __call__(self, path: str, answer: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
        if path != self.path:
            return answer()
        self.seen += 1
        return self.spoil(answer) if self.seen <= self.times else answer()


def change(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Callable[[], Any]], tuple[int, Any]]:
    """A good answer with something changed in it."""

    def spoil(answer: Callable[[], Any]) -> tuple[int, Any]:
        status, value = answer()
        edit(value)
        return status, value

    return spoil


def first_log_prob(value: Any) -> Callable[[Callable[[], Any]], tuple[int, Any]]:
    return change(lambda found: found["choices"][0]["logprobs"]["content"][0].update(logprob=value))


def first_id(value: Any) -> Callable[[Callable[[], Any]], tuple[int, Any]]:
    return change(lambda found: found["choices"][0]["token_ids"].__setitem__(0, value))


def cut_first(found: dict[str, Any]) -> None:
    """As a server that is shut down ends what it was writing."""
    longest = max(found["choices"], key=lambda choice: len(choice["token_ids"]))
    assert len(longest["token_ids"]) > 2
    longest["token_ids"], longest["logprobs"]["content"] = longest["token_ids"][:2], longest["logprobs"]["content"][:2]


def lose(answer: Callable[[], Any]) -> tuple[int, Any]:
    """It is done, but nobody hears of it."""
    answer()
    return 503, error("the answer was lost")


NO_ANSWERS = {
    "too few completions": change(lambda found: found["choices"].pop()),
    "no completions": change(lambda found: found.update(choices=None)),
    "no log-probability": first_log_prob(None),
    "log-probability nan": first_log_prob(math.nan),
    "log-probability -inf": first_log_prob(-math.inf),
    "ids that are none": change(lambda found: found["choices"][0].update(token_ids=["1"] * 6)),
    "cut short without an end": change(cut_first),
    "an id too few": change(lambda found: found["choices"][0]["token_ids"].pop()),
    "log-probability above 0": first_log_prob(5.0),
    "log-probability true": first_log_prob(True),
    "log-probability of float's least": first_log_prob(-1e308),
    "log-probability of 400 digits": lambda answer: (
        200,
        json.dumps(first_log_prob(77.5)(answer)[1]).replace("77.5", "1" * 400).encode(),
    ),
    "an id beyond the vocabulary": first_id(10**9),
    "an id of 30 digits": first_id(10**30),
    "an id below 0": first_id(-5),
    "an id that is true": first_id(True),
    "equal indices": change(lambda found: [choice.update(index=0) for choice in found["choices"]]),
    "an index that is true": change(lambda found: found["choices"][-1].update(index=True)),
    "prompt ids null": change(lambda found: found.update(prompt_token_ids=None)),
    "prompt ids a number": change(lambda found: found.update(prompt_token_ids=5)),
    "prompt ids an object": change(lambda found: found.update(prompt_token_ids={})),
    "deep JSON": lambda answer: (200, b"[" * 10**6),
    "truncated": lambda answer: (200, b'{"choices": [{"ind'),
    "no text": lambda answer: (200, b"\xff\xfe"),
    "429": lambda answer: (429, error("not now")),
    "500": lambda answer: (500, error("EngineCore encountered an issue")),
}


def test_an_answer_that_is_none_is_asked_again(stub, connect, make_items) -> None:
    engine, items = connect(stub.url), make_items([1])
    engine.check({"training": 500})
    good = engine.generate(RolloutRequest(items, SAMPLING, seeds=[5]))
    for name, spoil in NO_ANSWERS.items():
        stub.wrap = Spoiled("completions", spoil)
        again = engine.generate(RolloutRequest(items, SAMPLING, seeds=[5]))
        assert stub.wrap.seen == 2, name
        assert [r.token_ids.tolist() for r in again[0]] == [r.token_ids.tolist() for r in good[0]], name


def test_a_prompt_that_is_never_answered_ends_the_run_and_is_named(stub, connect, make_items) -> None:
    """The server is well, but for this prompt: it would be asked for ever."""
    engine, items = connect(stub.url, patience=0.3), make_items([1, 2])
    engine.check({"training": 500})
    stub.wrap = Spoiled("completions", lambda answer: (500, error("an image too wide")), times=10**6)
    began = time.monotonic()
    with pytest.raises(EndpointUnavailable, match=r"sample 'sample/\d'.*an image too wide"):
        engine.generate(RolloutRequest(items, SAMPLING))
    assert time.monotonic() - began > 0.3 and stub.wrap.seen >= 3


def test_a_server_that_hangs_holds_up_nobody(stub, other, connect, make_items) -> None:
    """It takes connections and answers nothing: at the start, at an update and in between."""
    release = threading.Event()
    other.wrap = lambda path, answer: (release.wait(60), answer())[1]
    engine, items = connect(stub.url, other.url, look=8.0, timeout=60.0), make_items([1] * 3)
    try:
        began = time.monotonic()
        engine.check({"training": 500})
        engine.sync()
        engine.generate(RolloutRequest(items, SAMPLING))
        assert time.monotonic() - began < 50 and other.asked == 0
        looks: list[str] = []
        other.wrap = lambda path, answer: (looks.append(path), release.wait(60), answer())[2]
        engine.sync()
        assert not looks, "one that is known to be dead is not waited for at an update"
    finally:
        release.set()
    other.wrap = lambda path, answer: answer()
    stub.before_answer = lambda: wait_for(lambda: other.asked > 0)
    engine.generate(RolloutRequest(items, SAMPLING))
    assert other.loads[-1] == engine.adapter.name


def test_a_server_that_is_gone_for_good_costs_an_update_nothing(stub, other, connect) -> None:
    engine = connect(stub.url, other.url)
    engine.sync()
    other.stop()
    engine.sync()
    before = [server.dead_since for server in engine._pool._servers]
    engine.sync()
    assert before[1] is not None and [server.dead_since for server in engine._pool._servers] == before
    assert list(stub.adapters) == [engine.adapter.name]
    other.start()


@pytest.mark.parametrize("path", ["load_lora_adapter", "unload_lora_adapter"])
def test_an_adapter_whose_answer_is_lost_is_no_fault(stub, connect, path) -> None:
    """The second attempt hears that it is there already, or there no more."""
    engine = connect(stub.url, attempts=2)
    engine.sync()
    stub.wrap = Spoiled(path, lose)
    engine.sync()
    assert stub.wrap.seen == 2 and list(stub.adapters) == [engine.adapter.name]


@pytest.mark.parametrize("fault", ["keeps it", "hangs", "is another"])
def test_an_end_asks_every_server_whatever_one_of_them_does(stub, other, connect, tmp_path, monkeypatch, fault) -> None:
    monkeypatch.setattr("lightning_modules.rollouts.vllm.engine.UNLOAD_TIMEOUT", 2.0)
    engine = connect(stub.url, other.url, timeout=60.0)
    engine.sync()
    other.wrap = lambda path, answer: answer() if path == "models" else (403, error("not you"))
    release = threading.Event()
    if fault == "hangs":
        other.wrap = lambda path, answer: (release.wait(60), answer())[1]
    elif fault == "is another":  # an error that ends a run: the other one's adapter goes all the same
        other.models = lambda: (200, {"data": [{"id": "of-the-base", "parent": None, "max_model_len": 4096}]})
        with pytest.raises(EndpointMisused, match="before it was started again"):
            engine.sync()
    began = time.monotonic()
    try:
        with pytest.raises(EndpointMisused, match="not you") if fault == "keeps it" else nullcontext():
            engine.close()
    finally:
        release.set()
    assert time.monotonic() - began < 30
    assert not stub.adapters and not list((tmp_path / "adapters").iterdir())


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("load_lora_adapter", (503, error("starting"))),
        ("completions", (503, error("starting"))),
        ("completions", (200, b"{")),
        ("models", (200, b'{"data": [{')),
    ],
    ids=["load", "complete", "truncated", "truncated models"],
)
def test_a_server_that_stumbles_while_it_is_checked_is_looked_at_again(stub, connect, path, answer) -> None:
    stub.wrap = Spoiled(path, lambda _: answer)
    connect(stub.url).check({"training": 500})
    assert stub.wrap.seen == 2


def test_a_server_whose_engine_dies_under_the_adapter_is_dead_and_not_misused(stub, other, connect, make_items) -> None:
    engine = connect(stub.url, other.url)
    engine.sync()

    def wrap(path: str, answer: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
        if path == "load_lora_adapter":
            return 500, error("EngineCore encountered an issue")
        return (503, "") if path == "health" else answer()

    other.wrap = wrap
    engine.sync()
    assert list(stub.adapters) == [engine.adapter.name] and engine.adapter.name not in other.adapters
    engine.generate(RolloutRequest(make_items([1]), SAMPLING))
    other.wrap = lambda path, answer: (500, error("no room")) if path == "load_lora_adapter" else answer()
    with pytest.raises(EndpointMisused, match=r"does not load the adapter.*no room"):
        engine._call(lambda pool: pool.look_once())


def test_a_server_that_comes_back_with_another_model_ends_the_run(stub, connect, make_items) -> None:
    engine = connect(stub.url)
    engine.sync()
    stub.stop()
    stub.models = lambda: (200, {"data": [{"id": "of-the-base", "parent": None, "max_model_len": 4096}]})
    stub.start()
    with pytest.raises(EndpointMisused, match=r"serves 'of-the-base' now, and 'tiny' before"):
        engine.generate(RolloutRequest(make_items([1]), SAMPLING))


def test_servers_that_stay_dead_end_the_run(stub, connect, make_items) -> None:
    engine = connect(stub.url, patience=0.3)
    engine.sync()
    stub.stop()
    with pytest.raises(ServersLost, match=r"patience=0.3 s.*same command goes on from the last checkpoint"):
        engine.generate(RolloutRequest(make_items([1]), SAMPLING))
    with pytest.raises(ServersLost):
        engine.sync()
    stub.start()


def test_other_prompt_tokens_are_an_error_that_names_the_sample(stub, connect, make_items) -> None:
    engine = connect(stub.url)
    image = engine.policy.image_token_id
    stub.read_prompt = lambda ids: [*ids[: ids.index(image)], *ids[ids.index(image) + 1 :]]  # an image token less
    with pytest.raises(PromptMismatch, match=r"sample 'sample/0': the server read (\d+) prompt tokens, the trainer"):
        engine.generate(RolloutRequest(make_items([2]), SAMPLING))


@pytest.mark.parametrize(
    ("wrong", "settings", "named"),
    [
        ({"raw_log_probs": True}, {}, "--logprobs-mode processed_logprobs"),
        ({"can_load": False}, {}, "--enable-lora"),
        ({"max_model_len": 80}, {}, "max_model_len=80"),
        ({}, {"model": "large"}, "vllm.model='large'"),
    ],
)
def test_a_server_that_cannot_serve_is_told_at_the_start(stub, connect, wrong, settings, named) -> None:
    for name, value in wrong.items():
        setattr(stub, name, value)
    with pytest.raises(EndpointMisused, match=named):
        connect(stub.url, **settings).check({"training": 500})


def test_an_adapter_that_servers_do_not_see_is_told(stub, connect, monkeypatch) -> None:
    engine = connect(stub.url)
    monkeypatch.setattr("lightning_modules.rollouts.vllm.engine.write_adapter", lambda *_: None)
    with pytest.raises(EndpointMisused, match="Does it see that folder"):
        engine.sync()


def test_a_job_that_no_preparation_helps_ends_the_run() -> None:
    async def prepare(endpoint) -> None:
        """Finds nothing wrong."""

    async def ask(endpoint, job) -> None:
        raise EndpointMisused("403 no")

    async def run() -> None:
        pool = ServerPool([EndpointSettings("m", "http://127.0.0.1:9/v1")], prepare, patience=5, pause=0.01, look=5)
        await pool.run([1, 2], ask)

    with pytest.raises(EndpointMisused, match="403 no"):
        asyncio.run(run())


@pytest.mark.parametrize("kind", [ServersLost, PromptMismatch, RequestRefused, AdapterNotGiven, StorageError])
def test_a_fault_of_a_server_or_a_disk_is_told_without_a_traceback(kind: type[Exception]) -> None:
    assert issubclass(kind, UserError)
