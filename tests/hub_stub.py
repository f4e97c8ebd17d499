"""A small Hugging Face Hub on loopback that takes uploads: what `huggingface_hub` asks of the real one, and no more."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class HubStub:
    """What has arrived. `refuse` is an HTTP status that every request gets; 0 for none."""

    url: str = ""
    refuse: int = 0
    keys: set[str | None] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)  # repository -> whether it was created as a private one
    files: dict[str, bytes] = field(default_factory=dict)  # path in the repository -> content
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    commits: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)  # paths that a commit has deleted


@contextmanager
def hub_stub() -> Iterator[HubStub]:
    """A stub that listens until the block ends."""
    hub = HubStub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: object, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.startswith("/api/"):
                hub.keys.add(self.headers.get("Authorization"))
            if hub.refuse:
                return self.answer({"error": "refused"}, hub.refuse)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization', 'me')}/{asked['name']}"
                hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
                return self.answer({"url": f"{hub.url}/{name}", "id": name})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/tree/" in self.path:
                sizes = {name: len(content) for name, content in hub.files.items()}
                return self.answer([{"type": "file", "path": name, "size": sizes[name], "oid": "1"} for name in sizes])
            if "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked
                ]
                return self.answer({"files": modes})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    blob | {"actions": {"upload": {"href": f"{hub.url}/blob/{blob['oid']}"}}}
                    for blob in json.loads(body)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if self.path.startswith("/blob/"):
                hub.blobs[self.path.removeprefix("/blob/")] = body
                return self.answer({})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "header":
                        hub.commits.append(line["value"]["summary"])
                    elif line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
                    elif line["key"] == "deletedFile":
                        del hub.files[line["value"]["path"]]
                        hub.deleted.append(line["value"]["path"])
                return self.answer({"commitUrl": f"{hub.url}/me/x/commit/{len(hub.commits)}", "commitOid": "1"})
            return self.answer({"error": "not found"}, 404)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
