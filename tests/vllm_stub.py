"""A server with the part of vLLM's API that rollouts use, and a real tiny model behind it: for tests of the client."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from lightning_modules.models.layers.lora import LoraSettings
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.serving.generation_rules import SERVER_FIELDS


class VLLMStub:
    """`with VLLMStub(model, lora) as stub`. Attributes say how it misbehaves; `loads` counts adapters as they come.

    `stop` and `start` are a kill and a restart at the same port: it forgets its adapters.
    """

    def __init__(self, model: str, lora: LoraSettings) -> None:
        self.policy = QwenVL(model, lora=lora).eval()
        self.encoder = Encoder(model, "absolute_pixels", "plain", 4096, 256, False)
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}
        self.loads: list[str] = []
        self.asked = 0
        self.port = 0
        self.lock = threading.Lock()
        self.loading = threading.Lock()  # vLLM loads one adapter at a time, each name once
        self.max_model_len, self.raw_log_probs, self.can_load = 4096, False, True
        self.read_prompt: Callable[[list[int]], list[int]] = lambda ids: ids
        self.before_answer: Callable[[], Any] = lambda: None
        # Of a request's last part of the path, and what would answer it: the status and body to send.
        self.wrap: Callable[[str, Callable[[], tuple[int, Any]]], tuple[int, Any]] = lambda path, answer: answer()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> VLLMStub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.adapters = {}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.rpartition("/")[2]
                self._answer(*stub.wrap(path, stub.models if path == "models" else stub.health))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = self.path.rpartition("/")[2]
                self._answer(*stub.wrap(path, lambda: stub.post(path, body)))

            def _answer(self, status: int, value: Any) -> None:
                text = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def models(self) -> tuple[int, Any]:
        base = {"id": "tiny", "parent": None, "max_model_len": self.max_model_len}
        return 200, {"data": [base, *({"id": name, "parent": "tiny"} for name in self.adapters)]}

    def health(self) -> tuple[int, Any]:
        return 200, ""

    def post(self, what: str, body: dict[str, Any]) -> tuple[int, Any]:
        if what == "completions":
            self.before_answer()
            with self.lock:
                return self._complete(body)
        if what == "unload_lora_adapter":
            return (200, "") if self.adapters.pop(body["lora_name"], None) else (404, error("no such adapter"))
        if not self.can_load:
            return 404, {"detail": "Not Found"}
        folder = Path(body["lora_path"])
        if not folder.is_dir():
            return 404, error(f"No adapter found for {folder}")
        with self.loading:
            if body["lora_name"] in self.adapters:
                return 400, error("already loaded")
            assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
            self.adapters[body["lora_name"]] = load_file(folder / "adapter_model.safetensors")
            self.loads.append(body["lora_name"])
        return 200, "Success"

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in ("tiny", *self.adapters):
            return 404, error(f"The model {body['model']} does not exist")
        if "allowed_token_ids" in body:
            content = [{"logprob": -3.0 if self.raw_log_probs else 0.0}]
            return 200, {"choices": [{"logprobs": {"content": content}}]}
        self.asked += 1
        greedy = body["temperature"] == 0
        ban = "placeholders" if greedy else "special"
        assert set(body["logit_bias"]) == {str(token) for token in self.policy.banned_ids(ban)}
        assert {name: body[name] for name in SERVER_FIELDS} == SERVER_FIELDS
        self._use(self.adapters.get(body["model"], {}))
        item = self._read(body["messages"])
        length = body["max_completion_tokens"]
        sampling = SamplingSettings(body["n"], body["temperature"] or 1.0, length)
        generator = torch.Generator().manual_seed(body["seed"])
        request = RolloutRequest([item], sampling, generator=generator, greedy=greedy, ban=ban)
        (group,) = NativeEngine(self.policy).generate(request)
        choices = [
            {
                "index": index,
                "token_ids": rollout.token_ids.tolist(),
                "logprobs": {"content": [{"logprob": value} for value in rollout.log_probs.tolist()]},
            }
            for index, rollout in enumerate(group)
        ]
        return 200, {"prompt_token_ids": self.read_prompt(item.input_ids.tolist()), "choices": choices[::-1]}

    def _use(self, adapter: dict[str, torch.Tensor]) -> None:
        own = {name.replace(".default.", "."): p for name, p in self.policy.model.named_parameters() if "lora_" in name}
        assert not adapter or adapter.keys() == own.keys()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(adapter[name] if adapter else torch.zeros_like(parameter))

    def _read(self, messages: list[dict[str, Any]]) -> EncodedSample:
        parts, images = [], []
        for part in messages[0]["content"]:
            if part["type"] == "text":
                parts.append(TextPart(part["text"]))
            else:
                parts.append(ImagePart(len(images)))
                images.append(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
        names = tuple(f"{k}.png" for k in range(len(images)))
        sample = Sample("asked", "stub", "stub", names, tuple(parts), BoxAnswer(0, (0.0, 0.0, 1.0, 1.0), "x"))
        return self.encoder.encode(LoadedSample(sample, tuple(images)))


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
