"""What every way to a remote file does where the other side fails; real servers, commands and a store in memory."""

from __future__ import annotations

import ast
import io
import re
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from datamodules.streaming import url_openers
from datamodules.streaming.url_openers import FetchError, Refused, open_url, read_some, retry
from tests.datamodules.streaming.shard_server import ShardServer, cut, hang_up, redirect, stall, status, whole
from tests.test_layout import PACKAGES, ROOT

SIGNS = {"fsspec": r"^ *(import|from) fsspec", "gopen": r"\bgopen\(", "shell": r"shell=True|os\.system|os\.popen"}
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def file(folder: Path) -> Path:
    (folder / "file").write_bytes(CONTENT)
    return folder / "file"


def read(url: str, start: int = 0) -> bytes:
    parts = []
    with open_url(url, start) as stream:
        while data := read_some(stream, 1000):
            parts.append(data)
    return b"".join(parts)


@pytest.mark.parametrize("start", [0, 1, 5000, len(CONTENT) - 1])
def test_http_gives_the_bytes_from_any_place_on(server: ShardServer, file: Path, start: int) -> None:
    assert read(f"{server.url}/file", start) == CONTENT[start:]
    assert server.asked[-1][1] == start, "the server is asked for the rest alone"
    server.faults["file"] = [whole]
    assert read(f"{server.url}/file", start) == CONTENT[start:], "also of a server that knows no ranges"


@pytest.mark.parametrize("code", [401, 403, 404, 410, 416])
def test_a_refusal_is_told_at_once(server: ShardServer, code: int) -> None:
    server.faults["gone"] = [status(code)]
    with pytest.raises(Refused, match=rf"gone cannot be fetched: HTTP {code}"):
        retry(f"{server.url}/gone", lambda: read(f"{server.url}/gone"))
    assert server.requests["gone"] == 1


@pytest.mark.parametrize(
    "fault", [status(500), status(503), status(429), hang_up], ids=["500", "503", "429", "hang up"]
)
def test_what_may_pass_is_tried_again(server: ShardServer, file: Path, fault, caplog) -> None:
    server.faults["file"] = [fault] * 3
    assert retry(f"{server.url}/file", lambda: read(f"{server.url}/file")) == CONTENT
    assert server.requests["file"] == 4
    assert "another attempt in" in caplog.text


def test_it_is_given_up_after_the_stated_attempts_in_few_lines(server: ShardServer, file: Path) -> None:
    server.stays, server.faults["file"] = True, [status(500)]
    with pytest.raises(FetchError, match="after 8 attempts: HTTP 500") as caught:
        retry(f"{server.url}/file", lambda: read(f"{server.url}/file"))
    assert server.requests["file"] == 8 and len(str(caught.value).splitlines()) <= 5


def test_a_server_that_is_gone_is_named(folder: Path) -> None:
    with ShardServer(folder) as server:
        url = f"{server.url}/shard-00000.tar"
    with pytest.raises(FetchError, match=r"shard-00000\.tar cannot be fetched, after 8 attempts: .*refused"):
        retry(url, lambda: read(url))


def test_silence_ends_an_attempt(server: ShardServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_openers, "TIMEOUT", 0.2)
    server.faults["file"] = [stall(30.0)]
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        read(f"{server.url}/file")
    assert time.monotonic() - began < 20.0, "not the server's thirty seconds"


def test_progress_starts_the_count_of_attempts_anew(server: ShardServer, file: Path) -> None:
    got = bytearray()

    def attempt() -> None:
        with open_url(f"{server.url}/file", len(got)) as stream:
            while data := read_some(stream):
                got.extend(data)
        if len(got) < len(CONTENT):
            raise ConnectionError("cut")

    server.faults["file"] = [cut(100)] * 20
    retry(f"{server.url}/file", attempt, lambda: len(got))
    assert bytes(got) == CONTENT and server.requests["file"] == 21


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/file", "http://[::1/file", "http://a b/c"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises((Refused, OSError)):
        read(url)


def test_a_redirect_leads_to_http_alone(server: ShardServer, file: Path) -> None:
    server.faults["moved"] = [redirect(f"{server.url}/file")]
    assert read(f"{server.url}/moved", 7) == CONTENT[7:]
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/file", "pipe:id"):
        server.faults["moved"] = [redirect(place)]
        with pytest.raises((Refused, OSError), match=r"redirect|HTTP 302|unknown url"):
            read(f"{server.url}/moved")


def test_the_hub_gets_the_token_and_the_host_it_redirects_to_does_not(
    server: ShardServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardServer(tmp_path) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "secret")
        at = "datasets/owner/name/resolve/v1/a/file"
        hub.faults[at] = [redirect(f"{server.url}/file")]
        assert read("hf://datasets/owner/name@v1/a/file", 3) == CONTENT[3:]
    assert hub.asked[0][0] == at and hub.asked[0][2]["Authorization"] == "Bearer secret"
    assert "Authorization" not in server.asked[-1][2] and server.asked[-1][1] == 3


def test_the_hub_is_not_asked_offline_or_for_what_is_no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="HF_HUB_OFFLINE=1"):
        read("hf://datasets/owner/name/file")
    with pytest.raises(Refused, match=r"hf://datasets/<owner>/<name>"):
        read("hf://owner/name/file")


class Store(MemoryFileSystem):
    """An object store in memory, under the name of a real one."""

    protocol = ("s3", "gs")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.split("://")[-1].strip("/")


def test_an_object_store_is_read_through_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Store)
    Store().pipe("s3://bucket/a/file", CONTENT)
    assert read("s3://bucket/a/file", 300) == CONTENT[300:]
    with pytest.raises(Refused, match="FileNotFoundError"):
        read("s3://bucket/a/gone")


class NoCredentialsError(Exception):
    """As botocore's, which is no OSError."""


class EndpointError(Exception):
    """Another of its own kinds."""


@pytest.mark.parametrize(("error", "told"), [(NoCredentialsError, Refused), (EndpointError, ConnectionError)])
@pytest.mark.parametrize("moment", ["open", "read"])
def test_errors_of_a_stores_own_kind_are_told_apart(monkeypatch: pytest.MonkeyPatch, error, told, moment: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no")

    class Broken(Store):
        def _open(self, path: str, **settings: object) -> io.RawIOBase:
            file = super()._open(path, **settings)
            file.read = fail
            return file

    if moment == "open":
        Broken._open = fail
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Broken)
    Store().pipe("s3://bucket/a/file", CONTENT)
    with pytest.raises(told, match=rf"{error.__name__}: no"):
        read("s3://bucket/a/file")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_store_whose_package_is_not_there_says_how_to_get_it(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(Refused, match=rf"{scheme}:// needs {package}: pip install .*\[{scheme}\]"):
        read(f"{scheme}://bucket/file")


def test_a_command_is_read_and_its_failure_and_silence_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(f"pipe:cat {file}", 300) == CONTENT[300:]
    with pytest.raises(ConnectionError, match="ended with status 3"):
        read(f"pipe:head -c 100 {file}; exit 3")
    monkeypatch.setattr(url_openers, "TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="gave nothing for"):
        read("pipe:echo a; sleep 30")
    assert time.monotonic() - began < 20.0


def test_no_opener_but_the_commands_runs_a_shell(server: ShardServer, file: Path, tmp_path: Path) -> None:
    """A URL is data, whatever it holds."""
    sign = tmp_path / "ran"
    for scheme in ("http", "https", "s3", "gs", "hf"):
        for injected in (f"$(touch {sign})", f";touch {sign};", f"`touch {sign}`", f"|touch {sign}"):
            with pytest.raises((Refused, OSError)):
                read(f"{scheme}://127.0.0.1:1/{injected}")
    assert not sign.exists()


def test_one_file_opens_urls_and_stores_and_runs_a_shell() -> None:
    signs = {name: re.compile(text, re.M) for name, text in SIGNS.items()}
    users: dict[str, set[str]] = {name: set() for name in signs}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            code = ast.unparse(ast.parse(file.read_text()))  # without comments
            for name, sign in signs.items():
                if sign.search(code):
                    users[name].add(str(file.relative_to(ROOT)))
    assert all(found == {"datamodules/streaming/url_openers.py"} for found in users.values()), users
