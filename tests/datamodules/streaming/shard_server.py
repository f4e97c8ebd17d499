"""A real HTTP server of a folder, on loopback, that fails as it is told.

with ShardServer(folder) as server:
    server.faults["shard-00000.tar"] = [cut(100), status(500)]   # its next two answers; then it serves
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Fault = Callable[["Handler", bytes, int], None]  # (request, content, first byte that is asked for)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        owner: ShardServer = self.server.owner
        name = unquote(self.path).lstrip("/")
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(found[1]) if found else 0
        owner.requests[name] += 1
        owner.asked.append((name, start, dict(self.headers)))
        faults = owner.faults[name]
        path = owner.folder / name
        if faults:
            content = path.read_bytes() if path.is_file() else b""
            (faults[0] if owner.stays else faults.pop(0))(self, content, start)
        elif not path.is_file():
            status(404)(self, b"", 0)
        else:
            self.give(path.read_bytes(), start)

    def give(self, content: bytes, start: int = 0, least: int | None = None) -> None:
        """The content from `start` on; only its first `least` bytes, and then the end of the connection."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.pour(content[start:] if least is None else content[start : start + least])
        if least is not None:
            self.close_connection = True

    def pour(self, data: bytes) -> None:
        """At the server's rate, if it has one."""
        owner: ShardServer = self.server.owner
        with contextlib.suppress(ConnectionError):
            for k in range(0, len(data), 1 << 16):
                self.wfile.write(data[k : k + (1 << 16)])
                owner.num_bytes += len(data[k : k + (1 << 16)])
                owner.pace()

    def log_message(self, *_: object) -> None:
        pass


class ShardServer:
    """Serves `folder`; `requests` counts by file. With `rate` it gives so many bytes a second to all together."""

    def __init__(self, folder: Path, rate: float | None = None, port: int = 0) -> None:
        self.folder, self.rate = folder, rate
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.stays = False  # the first fault of a file goes on for ever
        self.requests: Counter[str] = Counter()
        self.asked: list[tuple[str, int, dict[str, str]]] = []  # (file, first byte, headers)
        self.num_bytes = 0
        self._turn, self._free = threading.Lock(), 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.owner = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ShardServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def pace(self) -> None:
        """Wait until the bytes of one write are due."""
        if self.rate:
            with self._turn:
                now = time.monotonic()
                self._free = max(self._free, now - 0.05) + (1 << 16) / self.rate
                wait = self._free - now
            time.sleep(max(0.0, wait))


def status(code: int) -> Fault:
    def fault(request: Handler, content: bytes, start: int) -> None:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return fault


def cut(least: int) -> Fault:
    """The answer ends after `least` bytes, though it has announced all."""
    return lambda request, content, start: request.give(content, start, least)


def whole(request: Handler, content: bytes, start: int) -> None:
    """The whole file, whatever part was asked for."""
    request.give(content)


def stall(seconds: float, least: int = 10) -> Fault:
    """`least` bytes, then nothing for so long."""

    def fault(request: Handler, content: bytes, start: int) -> None:
        request.give(content, start, least)
        request.wfile.flush()
        time.sleep(seconds)

    return fault


def hang_up(request: Handler, content: bytes, start: int) -> None:
    """No answer at all."""
    request.close_connection = True


def redirect(url: str) -> Fault:
    def fault(request: Handler, content: bytes, start: int) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return fault


def other(content: bytes) -> Fault:
    """Other bytes than the file's."""
    return lambda request, _, start: request.give(content, start)
