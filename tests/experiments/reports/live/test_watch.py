"""`make watch`: a server on loopback whose page follows the files of a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from datamodules.persistence import folder_lock
from datamodules.samples.sample import BoxAnswer
from experiments.reports.live import watch
from experiments.reports.live.step_timeline import NEWEST, timeline
from experiments.reports.live.watch import PortInUse, WatchServer
from lightning_modules.rl.rollout_log import RolloutLog
from tests.browser import opened_pages
from tests.experiments.test_compare import HOSTILE, logged_group
from tests.experiments.test_inspect_shards import write_shards
from tests.page_faults import page_faults

SPEEDS = {
    "speed/data_wait": 0.5,
    "speed/rollout_seconds": 2.0,
    "speed/reward_seconds": 0.25,
    "speed/reference_seconds": 0.75,
    "speed/update_seconds": 4.0,
}


def log_step(phase: Path, step: int, **values: float) -> None:
    file = phase / "attempts/0/metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as rows:
        rows.write(json.dumps({"step": step, "reward/total": 0.1 * step} | SPEEDS | values) + "\n")


@pytest.fixture
def phase(tmp_path: Path) -> Path:
    """A GRPO run with three steps and four groups."""
    shards = write_shards(tmp_path / "shards", *[BoxAnswer(0, (0.2, 0.2, 0.6, 0.6), "dog")] * 3, images=2)
    phase = tmp_path / "outputs/nano/grpo"
    for step in range(3):
        log_step(phase, step)
    arguments = {"model": "models/tiny", "rollout": {"log": "rollouts.jsonl"}}
    settings = {"model": {"init_args": arguments}, "data": {"box_format": "absolute_pixels", "shards": str(shards)}}
    (phase / "config.yaml").write_text(yaml.safe_dump(settings))
    groups = [logged_group(number) | {"id": f"s{number % 3}"} for number in range(4)]
    RolloutLog(phase / "rollouts.jsonl").append(groups)
    return phase


@pytest.fixture
def server(phase: Path) -> Iterator[WatchServer]:
    server = WatchServer(phase.parent, 0, 0.2)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_parts_of_a_step_add_up() -> None:
    rows = [{"step": str(step)} | {name: str(value) for name, value in SPEEDS.items()} for step in range(NEWEST + 5)]
    rows.append({"step": "99", "mig_bench_val/avg": "3.0"})  # no times
    steps = timeline(rows)
    assert [step["step"] for step in steps] == list(range(NEWEST + 4, 4, -1))
    parts = {part["name"]: part["seconds"] for part in steps[0]["parts"]}
    assert parts == {"wait": 0.5, "rollout": 2.0, "reward": 0.25, "reference": 0.75, "update": 3.0}
    assert steps[0]["seconds"] == 6.5 and sum(part["share"] for part in steps[0]["parts"]) == pytest.approx(
        100, abs=0.1
    )


def test_a_run_without_rollouts_has_wait_and_update() -> None:
    (step,) = timeline([{"step": "3", "speed/data_wait": "0.5", "speed/seconds_per_batch": "2.0"}])
    assert {part["name"]: part["seconds"] for part in step["parts"]} == {"wait": 0.5, "update": 1.5}
    assert timeline([{"step": "3", "train/loss": "0.5"}]) == []


def test_the_page_follows_the_run(server: WatchServer, phase: Path) -> None:
    with opened_pages(1, server.address.rstrip("/")) as (page,):
        page.set_default_timeout(180_000)  # of a busy machine
        page.goto(server.address)
        follow(page, phase)


def follow(page: Any, phase: Path) -> None:
    """The run goes on for a step while its page is open."""
    now = page.locator("#now")
    assert "grpo is not running, step 2" in now.inner_text()
    assert page.locator(".timeline tbody tr").count() == 3
    assert now.locator(".group").count() == 4 and HOSTILE[0] not in page.locator("script").first.inner_text()
    page.wait_for_function("[...document.images].length === 8 && [...document.images].every((i) => i.naturalWidth > 0)")
    assert page_faults(page) == []
    now.locator("details").nth(1).locator("summary").click()
    with folder_lock.locked(phase):
        log_step(phase, 3, **{"speed/data_wait": 9.0})
        RolloutLog(phase / "rollouts.jsonl").append([logged_group(8) | {"id": "s1"}])
        page.wait_for_function("document.querySelector('#now').innerText.includes('grpo is running, step 3')")
    assert page.locator(".timeline tbody tr").first.locator("td").nth(1).inner_text() == "15.00"
    assert "update 4" in now.locator(".group").first.inner_text(), "the newest group is first"
    cursor = page.get_by_role("slider").first
    cursor.focus()
    page.keyboard.press("Home")
    assert "step 0" in page.locator(".readout").first.inner_text(), "charts of the new content have their keys"


def test_a_server_that_ends_is_told_on_the_page(phase: Path) -> None:
    server = WatchServer(phase.parent, 0, 0.2)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # Which of these the browser says depends on how far its request was when the server ended.
    ends = ("CONNECTION_REFUSED", "CONNECTION_RESET", "CONNECTION_CLOSED", "SOCKET_NOT_CONNECTED", "EMPTY_RESPONSE")
    known = [f"Failed to load resource: net::ERR_{end}" for end in ends]
    with opened_pages(1, server.address.rstrip("/"), known=known) as (page,):
        page.goto(server.address)
        server.shutdown()
        server.server_close()
        page.wait_for_function("document.querySelector('#connection').innerText.includes('does not answer')")


def test_before_the_run_the_page_waits(tmp_path: Path) -> None:
    server = WatchServer(tmp_path / "outputs/later", 0, 3600.0)
    assert "every 3600.0 s" in server.page.html()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with opened_pages(1, server.address.rstrip("/")) as (page,):
        page.set_default_timeout(180_000)  # of a busy machine
        page.goto(server.address)
        assert "No run is in" in page.locator("body").inner_text() and page_faults(page) == []
        log_step(tmp_path / "outputs/later/cot_sft", 0)
        page.reload()  # as the page does after its interval
        assert "cot_sft" in page.locator("#now").inner_text()
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_this_machine_and_only_pictures_are_served(server: WatchServer) -> None:
    def ask(path: str, host: str = "localhost") -> int:
        connection = HTTPConnection("127.0.0.1", server.server_address[1])
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status

    assert server.server_address[0] == "127.0.0.1"
    assert ask("/") == ask("/state") == 200
    assert ask("/", "evil.example") == 403
    for path in ("/pictures/../../config.yaml", "/pictures/%2e%2e/config.yaml", "/config.yaml", "/pictures/absent.png"):
        assert ask(path) == 404, path
    picture = next(server.pictures.iterdir()).name
    with urlopen(f"{server.address}pictures/{picture}") as answer:
        kinds = {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8\xff\xe0"}
        assert answer.read(4) == kinds[answer.headers["Content-Type"]]


def test_an_unchanged_run_is_not_read_again(server: WatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = server.page.html()
    monkeypatch.setattr(server.page, "_render", lambda state: pytest.fail("built again"))
    assert server.page.html() is first


def test_a_port_in_use_is_one_line_with_the_cure(server: WatchServer, phase: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(PortInUse, match=rf"--port={port} is in use; choose another, such as --port={port + 1}"):
        WatchServer(phase.parent, port, 1.0)
    with pytest.raises(SystemExit) as caught:
        watch.main(["--folder", str(phase.parent), "--port", str(port)])
    assert str(caught.value).count("\n") == 0 and "is in use" in str(caught.value)
    with pytest.raises(SystemExit, match="--port=99999 must be below 65536"):
        watch.main(["--port", "99999"])
