"""Open URLs as byte streams: https, http, s3, gs, hf://datasets/… and pipe.

The openers here replace webdataset's own in its table `gopen_schemes`. Webdataset's openers run curl and gsutil, do not
support s3, and report an error only when they are closed. Here, only `pipe:` runs a shell. Every stream can begin at a
given byte, so an interrupted download continues where it ended.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from typing import IO, Any, TypeVar

from datamodules.persistence.files import StorageError
from datamodules.persistence.user_error import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT = 30.0  # an attempt fails after this number of seconds without any byte
TRIES = 8  # attempts in a row without a new byte; with their pauses they take two minutes
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts: the first, doubled each time up to the last
PIPE = "pipe:"
SCHEMES = ("http", "https", "s3", "gs", "hf")
# Status codes for a wrong request: another attempt would get the same answer. 408, 425 and 429 ask to wait, so they are
# excluded.
REFUSALS = frozenset(range(400, 500)) - {408, 425, 429}
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}  # packages that fsspec needs; they are extras in setup.cfg
CHUNK = 1 << 20  # bytes
CURE = "Look whether the server can be reached and holds the file; the same command goes on where this one ended"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_HF = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)")


class FetchError(UserError, RuntimeError):
    """A remote file cannot be downloaded. The message names the file, the reason and the fix.

    A run never continues without its data.
    """


class Refused(FetchError):
    """A remote file for which another attempt would fail too: it does not exist, or access is denied."""


def scheme_of(location: str) -> str | None:
    """ "https" of a URL, "pipe" of a command, "file" of file://…; None for a path."""
    if location.startswith(PIPE):
        return "pipe"
    found = _SCHEME.match(location)
    return found[1].lower() if found else None


def open_url(url: str, start: int = 0) -> IO[bytes]:
    """The bytes of a remote file from byte `start` on, opened by webdataset's `gopen`.

    Raises:
        Refused: another attempt would fail in the same way.
        OSError: another attempt may succeed.
    """
    from webdataset.gopen import gopen, gopen_schemes  # imports torch, which commands without remote shards do not need

    gopen_schemes.update(OPENERS)
    try:
        return gopen(url, "rb", start=start)
    except ValueError as error:
        raise Refused(f"not a URL: {error}") from error


def open_http(url: str, mode: str = "rb", bufsize: int = 0, start: int = 0, token: str | None = None) -> IO[bytes]:
    """Open a file on an HTTP server, with the signature of webdataset's openers.

    Args:
        url: http:// or https://.
        mode, bufsize: part of that signature; not used.
        start: the first byte to return. If the server ignores it and sends the whole file, the bytes before are
            skipped.
        token: bearer token that is sent to this host, but not to hosts to which it redirects.
    """
    headers = {"User-Agent": "multi-image-grounding", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        stream = urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        failure = Refused if error.code in REFUSALS else ConnectionError
        raise failure(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise ConnectionError(str(error.reason)) from error
    except http.client.InvalidURL as error:
        raise Refused(f"not a URL: {error}") from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"no answer of HTTP: {error!r}") from error
    if start and stream.status != 206:
        _skip(stream, start)
    elif start and not stream.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        stream.close()
        raise ConnectionError(f"the server sent {stream.headers.get('Content-Range')}, byte {start} was asked for")
    return stream


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if scheme_of(newurl) not in allowed:
            raise Refused(f"HTTP {code}: a redirect from {req.type} to {newurl:.100}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_hub(url: str, mode: str = "rb", bufsize: int = 0, start: int = 0) -> IO[bytes]:
    """Open a file of a data set on the Hugging Face Hub: hf://datasets/<owner>/<name>[@<revision>]/<path>."""
    from huggingface_hub import constants, get_token, hf_hub_url

    found = _HF.fullmatch(url)
    if found is None:
        raise Refused("it is not of the form hf://datasets/<owner>/<name>[@<revision>]/<path>")
    if constants.HF_HUB_OFFLINE:
        raise Refused("HF_HUB_OFFLINE=1 is set")
    address = hf_hub_url(found["repo"], found["path"], repo_type="dataset", revision=found["revision"])
    return open_http(address, mode, bufsize, start, get_token())


def open_store(url: str, mode: str = "rb", bufsize: int = 0, start: int = 0) -> IO[bytes]:
    """Open a file in an object store that fsspec supports. Keys come from the environment, as in the store's own tools.

    The fsspec filesystem is created for each file. One from before a fork could wait forever for a thread that the fork
    has not copied.
    """
    import fsspec

    scheme = str(scheme_of(url))
    try:
        store = fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        package = EXTRAS[scheme]
        raise Refused(f"{scheme}:// needs {package}: pip install -e '.[{scheme}]'") from error
    with _errors_of_stores():
        stream: Any = _Stored(store.open(url, "rb"))
        stream.file.seek(start)
    return stream


class _Stored:
    """A file in an object store. Its errors are those of ordinary files."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def __enter__(self) -> _Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        with _errors_of_stores():
            return self.file.read(size)


@contextlib.contextmanager
def _errors_of_stores() -> Iterator[None]:
    """Convert errors of the stores' libraries to Refused, or to OSError if another attempt may succeed."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    except OSError:
        raise
    except Exception as error:
        failure = Refused if "Credential" in type(error).__name__ else ConnectionError
        raise failure(f"{type(error).__name__}: {error}") from error


def open_pipe(url: str, mode: str = "rb", bufsize: int = 0, start: int = 0) -> IO[bytes]:
    """The output of a shell command, "pipe:<command>".

    Only text that the user wrote may be passed here, because it runs in a shell.
    """
    stream: Any = _Output(url.removeprefix(PIPE))
    _skip(stream, start)
    return stream


class _Output:
    """The output of a shell command. A long silence, or an exit status other than 0, is an error."""

    def __init__(self, command: str) -> None:
        # A new session, so that the children of the shell, which hold the pipe, are ended together with it.
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        if not select.select([stream], [], [], TIMEOUT)[0]:
            raise TimeoutError(f"the command gave nothing for {TIMEOUT:g} s")
        data = stream.read(size)
        if not data and (status := self._process.wait(TIMEOUT)) != 0:
            raise ConnectionError(f"the command ended with status {status}")
        return data

    def close(self) -> None:
        if self._process.poll() is None:  # otherwise the id may already belong to another process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


def retry(url: str, attempt: Callable[[], T], progress: Callable[[], int] = int, tries: int = TRIES) -> T:
    """Call `attempt` and return its result. If the connection fails, call it again after a pause.

    Args:
        url: named in messages.
        attempt: downloads something from `url`.
        progress: returns the number of downloaded bytes; if it has grown, attempts are counted from 0 again.
        tries: number of attempts in a row without progress, after which the function gives up.

    Raises:
        FetchError: the server refused the request, or all attempts failed.
        StorageError: a local file cannot be written.
    """
    failures, most = 0, progress()
    while True:
        try:
            return attempt()
        except StorageError:
            raise
        except Refused as error:
            raise Refused(f"{url} cannot be fetched: {error}.\n{CURE}") from error
        except (OSError, http.client.HTTPException) as error:
            has_more = progress() > most
            most, failures = max(most, progress()), 1 if has_more else failures + 1
            if failures >= tries:
                raise FetchError(f"{url} cannot be fetched, after {tries} attempts: {error}.\n{CURE}") from error
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1))
            log.warning("%s: %s; another attempt in %g s", url, error, pause)
            time.sleep(pause)


def read_some(stream: IO[bytes], size: int = CHUNK) -> bytes:
    """The next bytes, at most `size`, as soon as there are any; b"" at the end."""
    return getattr(stream, "read1", stream.read)(size)


def _skip(stream: IO[bytes], count: int) -> None:
    """Read and ignore the first `count` bytes."""
    while count:
        data = read_some(stream, min(CHUNK, count))
        if not data:
            stream.close()
            raise ConnectionError(f"it ended {count} bytes before the place to go on from")
        count -= len(data)


OPENERS = {
    "http": open_http,
    "https": open_http,
    "hf": open_hub,
    "s3": open_store,
    "gs": open_store,
    "pipe": open_pipe,
}
