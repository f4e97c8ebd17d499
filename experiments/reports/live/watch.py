"""Watch a running experiment in the browser: `make watch`, then open the printed address.

    make watch ARGS="--folder outputs/nano-seed1 --port 8766"

The page is the experiment's report with the times of the newest steps and the newest groups of rollouts. It changes by
itself. Only this machine can open it; through SSH: ssh -L 8765:127.0.0.1:8765 machine.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from datamodules.persistence.user_error import UserError
from experiments.reports.live.live_page import LivePage
from experiments.reports.pipeline_report import reportable
from experiments.runs.commands import command
from experiments.runs.usage_errors import PlainParser

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
KINDS = {".png": "image/png", ".jpg": "image/jpeg"}


class PortInUse(UserError):
    """Another process listens on the port. The message has the cure."""


class WatchServer(ThreadingHTTPServer):
    """Serves the page of one experiment on loopback.

    Args:
        folder: the experiment's folder.
        port: a port; 0 takes a free one.
        seconds: how often the page in the browser asks for changes.

    Raises PortInUse.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int, seconds: float) -> None:
        self._temporary = TemporaryDirectory(prefix="watch-")
        self.pictures = Path(self._temporary.name) / "pictures"
        self.page, self.lock = LivePage(folder, self.pictures, seconds), threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed"
            raise PortInUse(f"--port={port} {reason}; choose another, such as --port={max(port, 1024) + 1}") from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def server_close(self) -> None:
        super().server_close()
        self._temporary.cleanup()


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        # A page of another origin could name a host that resolves to this machine; it is refused by its name.
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in (HOST, "localhost"):
            return self._send(HTTPStatus.FORBIDDEN, "text/plain", b"only this machine may ask")
        path = urlsplit(self.path).path
        try:
            if path == "/":
                with self.server.lock:  # one page is built at a time
                    page = self.server.page.html()
                return self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())
            if path == "/state":
                return self._send(HTTPStatus.OK, "text/plain", self.server.page.state().encode())
            if found := re.fullmatch(r"/pictures/([\w-]+(\.\w+))", path):
                file = self.server.pictures / found[1]
                if file.is_file() and found[2] in KINDS:
                    return self._send(HTTPStatus.OK, KINDS[found[2]], file.read_bytes())
        except (OSError, ValueError, KeyError) as error:  # files of the run change or go while they are read
            log.warning("%s: %s", path, error)
            return self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"not now: {error}".encode())
        return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"nothing here")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the browser has gone
            pass

    def log_message(self, *_: object) -> None:
        """Requests are not printed."""


@command
def main(args: list[str] | None = None) -> None:
    """Entry point of `make watch`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder of an experiment; the latest by default")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder that holds all of them")
    parser.add_argument("--port", type=int, default=8765, help="port on this machine; 0 takes a free one")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks of the page for changes")
    given = parser.parse_args(args)
    if not 0 <= given.port < 2**16 or given.every <= 0:
        parser.error(f"--port={given.port} must be below 65536, and --every={given.every} above 0")
    folder = given.folder or next(iter(reportable(given.outputs)), given.outputs / "nano")
    server = WatchServer(folder, given.port, given.every)
    print(f"watching {folder}: open {server.address} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
