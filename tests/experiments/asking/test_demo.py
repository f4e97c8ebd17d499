"""`make demo`: the page in a real browser, two users at once, and mistakes."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageDraw

from datamodules.images.image_loading import load_image
from datamodules.metrics.predictions import Reply
from datamodules.persistence.user_error import UserError
from datamodules.samples.boxes import BoxFormat, ImageSizes
from experiments.asking import demo
from experiments.asking.grounding_model import GroundingModel
from experiments.asking.one_question import COLOUR, build_question, split_text
from experiments.asking.side_by_side import ask_side_by_side
from experiments.evaluation.evaluation_settings import QuestionLimits
from tests.browser import opened_pages
from tests.chat_server import ChatServer, question_text, streamed
from tests.experiments.conftest import ROOT

# Gradio's page writes this to the console when it closes its first connection to the server.
KNOWN = ("Method not implemented.",)
THINKING, BOX = "It is in image 2.", '{"bbox_2d": [10, 20, 30, 50], "label": "blue square"}'
PATIENCE = 120_000  # milliseconds; the machine may be busy


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """A red and a blue square."""
    paths = []
    for number, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (84, 84), "white")
        ImageDraw.Draw(picture).rectangle((20, 20, 50, 50), fill=colour)
        paths.append(str(tmp_path / f"{colour}-{number}.png"))
        picture.save(paths[-1])
    return paths


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    """start(*flags) runs the command and returns the page's address; the command ends with the test.

    `start.processes` are those that were started.
    """
    started: list[subprocess.Popen] = []

    def run(*flags: str) -> str:
        pytest.importorskip("gradio", reason="no gradio: pip install -e '.[demo]'")
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "experiments.asking.demo", f"--port={port}", "--device=cpu", *flags]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GRADIO_SHARE": "True"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        for line in process.stdout:
            if "is open" in line:
                return line.split(" ")[0]
        raise AssertionError(f"the command ended with {process.wait()}")

    run.processes = started
    yield run
    for process in started:
        process.terminate()
        process.communicate()


def drop(page: Any, address: str, files: list[str], question: str) -> None:
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#ask")
    page.set_input_files("#images input[type=file]", files)
    page.wait_for_selector("#numbered img")
    page.fill("#question textarea", question)


def wait_for(page: Any, field: str, text: str) -> None:
    script = "([field, text]) => document.querySelector(field)?.value.includes(text)"
    page.wait_for_function(script, arg=[f"#{field} textarea", text])


def cpu_seconds(process: subprocess.Popen) -> float:
    """The CPU time that a process has used so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def drawn(page: Any, number: int = 1) -> Image.Image:
    """The picture with the boxes of a model, as the page shows it."""
    picture = page.wait_for_selector(f"#boxes-{number} img")
    kind, _, data = picture.get_attribute("src").partition(",")
    assert kind == "data:image/png;base64"
    return load_image(base64.b64decode(data), 10**7)


def test_two_users_at_once_see_thinking_grow_and_then_boxes(images: list[str], start) -> None:
    both_asked, asked = threading.Event(), []

    def reply(request: dict) -> str | list:
        if "Which colour" in question_text(request):  # the check of the server
            return "grey"
        asked.append(request["model"])
        return streamed(f"<think>{THINKING}", both_asked, f"</think><answer>{BOX}</answer>")

    with ChatServer(reply) as server:
        endpoint = f"--endpoint.base_url={server.base_url}"
        address = start("--models=[one,two]", endpoint, "--form.model_family=qwen2_5_vl")
        with opened_pages(2, address, KNOWN) as pages:
            for page in pages:
                drop(page, address, images, "Find the blue square.")
            for page in pages:
                page.click("#ask")
            for page in pages:
                wait_for(page, "thinking-1", THINKING)
                assert page.input_value("#answer-1 textarea") == "" and not page.query_selector("#boxes-1 img")
            assert asked == ["one", "one"], "the second user does not wait for the first"
            both_asked.set()
            for page in pages:
                for number in (1, 2):
                    wait_for(page, f"answer-{number}", "Box in image 2, pixels: [10.0, 20.0, 30.0, 50.0] blue square")
                    colours = {colour for _, colour in drawn(page, number).getcolors(10**6)}
                    assert tuple(int(COLOUR[i : i + 2], 16) for i in (1, 3, 5)) in colours
    assert sorted(asked) == ["one", "one", "two", "two"]


@pytest.mark.slow
def test_the_committed_base_answers_two_users_and_mistakes_are_told_on_the_page(
    images: list[str], start, tmp_path: Path
) -> None:
    address = start("--models=[nano]", "--decoding.max_new_tokens=64", "--max_images=4")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with opened_pages(2, address, KNOWN) as pages:
        for page in pages:
            drop(page, address, images, "Find the blue square in image-2.")
        before = cpu_seconds(start.processes[0])
        for page in pages:
            page.click("#ask")
        answers = set()
        for page in pages:
            wait_for(page, "answer-1", "Box in image 2, pixels: [")
            answers.add(page.input_value("#answer-1 textarea"))
            assert drawn(page).size == (2 * 420 + 8, 420)
        spent = cpu_seconds(start.processes[0]) - before
        assert spent < 5, "the model is loaded before the page opens, so that the first click only waits for the answer"
        assert len(answers) == 1, "the same question has the same answer"
        first, second = pages
        first.fill("#question textarea", " ")
        first.click("#ask")
        wait_for(first, "message", "question: it is empty")
        second.goto(address)
        second.wait_for_selector("#ask")
        second.click("#ask")
        wait_for(second, "message", "images: none is given")
        second.set_input_files("#images input[type=file]", [str(broken)])
        wait_for(second, "message", "images: broken.png: unreadable_image")


class Slow:
    """A predictor whose answer grows by a word for each permission."""

    box_format = BoxFormat.ABSOLUTE_PIXELS

    def __init__(self, ending: Exception | None = None) -> None:
        self.ending, self.go_on, self.ended = ending, threading.Semaphore(0), threading.Event()

    def stream(self, loaded: object, show: Callable[[str], None]) -> Reply:
        try:
            show("<think>It is")
            self.go_on.acquire(timeout=60)
            show("<think>It is in")
        finally:
            self.ended.set()
        if self.ending:
            raise self.ending
        sizes = ImageSizes((84, 84), (84, 84))
        return Reply(f"<think>It is in image 1.</think><answer>{BOX}</answer>", (sizes, sizes))


def model_of(predictor: Slow) -> GroundingModel:
    model = object.__new__(GroundingModel)
    model.name, model.limits, model.predictor, model._lock = "slow", QuestionLimits(), predictor, threading.Lock()
    return model


def test_one_model_follows_the_other_and_one_without_answer_says_why(images: list[str]) -> None:
    lost, good = Slow(UserError("the server is gone")), Slow()
    lost.go_on.release()
    good.go_on.release()
    loaded = build_question(images, "Find it.", 10**6)
    seen = list(ask_side_by_side([model_of(lost), model_of(good)], loaded, "Find it."))
    assert seen[-1][0].answer == "No answer: the server is gone"
    assert seen[-1][1].thinking == "It is in image 1." and "Box in image 1" in seen[-1][1].answer
    assert seen[-1][1].drawing is not None and seen[0][1].drawing is None


def test_an_error_of_the_code_is_raised(images: list[str]) -> None:
    wrong = Slow(ZeroDivisionError("no"))
    wrong.go_on.release()
    with pytest.raises(ZeroDivisionError):
        list(ask_side_by_side([model_of(wrong)], build_question(images, "Find it.", 10**6), "Find it."))


def test_a_user_who_leaves_ends_the_answer(images: list[str]) -> None:
    slow = Slow()
    asking = ask_side_by_side([model_of(slow)], build_question(images, "Find it.", 10**6), "Find it.")
    assert next(asking)[0].thinking == "It is"
    asking.close()
    slow.go_on.release()
    assert slow.ended.wait(60)


def test_a_text_that_grows_is_split_at_its_tags() -> None:
    assert split_text("<think>It") == ("It", "")
    assert split_text("<think>It is</think><answer>[1") == ("It is", "[1")
    assert split_text("<answer>[1]</answer>") == ("", "[1]")
    assert split_text("[1]") == ("", "[1]")


def test_models_that_exist_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.default_models() == ["nano"]
    (tmp_path / demo.TRAINED[1]).mkdir(parents=True)
    (tmp_path / demo.TRAINED[1] / "config.json").write_text("{}")
    assert demo.default_models() == ["nano", demo.TRAINED[1]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models=[a,b,c,d]"], "models: 4 are given; the page has room for 3"),
        (["--port=0"], "port=0 must be in 1..65535"),
        (["--models=[nowhere/at-all]"], "nowhere/at-all"),
        (["--models=[a]", "--endpoint.base_url=http://127.0.0.1:9/v1"], "model='a' is of no known family"),
        (
            ["--models=[a]", "--endpoint.base_url=http://127.0.0.1:9/v1", "--form.model_family=qwen2_5_vl"],
            "no server listens at http://127.0.0.1:9/v1",
        ),
    ],
)
def test_mistakes_are_told_in_short(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="no gradio: pip install -e '.[demo]'")
    forget_what_it_sets(monkeypatch)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemExit) as caught:
        demo.main([f"--port={port}", "--device=cpu", *flags])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_a_port_in_use_and_a_missing_package_are_told_before_a_model_is_loaded(monkeypatch) -> None:
    forget_what_it_sets(monkeypatch)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"port={port}: Address already in use. Choose another one"):
            demo.main([f"--port={port}"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "experiments.asking.demo_page", raising=False)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[demo\]'"):
        demo.main([f"--port={port}"])


def test_too_many_images_are_refused(images: list[str]) -> None:
    pytest.importorskip("gradio", reason="no gradio: pip install -e '.[demo]'")
    from experiments.asking import demo_page

    models = [SimpleNamespace(limits=QuestionLimits())]
    (values,) = demo_page.ask(models, images * 25, "Find it.", 16)
    assert values[0]["value"] == "50 images are too many: a question has at most 16" and values[1:] == ["", "", ""]


def forget_what_it_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables and the signal handler that the command sets for its process."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
