"""Decoding steps on a GPU as CUDA graphs: one launch per step instead of one launch per kernel."""

from __future__ import annotations

import logging

import torch

from lightning_modules.rollouts.native.decoder import CompletionDecoder

# number of steps before a capture, because libraries choose kernels and allocate workspaces in the first steps
WARM_UP = 2

log = logging.getLogger(__name__)


class GraphedSteps:
    """Runs `decoder.step_all(width)`: captures it at the first call with each width, and replays it after that.

    A graph contains the addresses of the decoder's memory and of the model's weights, so these tensors must not move.
    """

    def __init__(self, decoder: CompletionDecoder) -> None:
        self.decoder = decoder
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one at a time, so they can share memory

    def __call__(self, width: int) -> None:
        if width not in self._graphs:
            with torch.cuda.device(self.decoder.rows.device):  # a stream belongs to the current device
                self._graphs[width] = self._capture(width)
        self._graphs[width].replay()

    def _capture(self, width: int) -> torch.cuda.CUDAGraph:
        log.info("capturing a decoding step of %d rows, %d tokens wide", len(self.decoder.rows), width)
        changed = self.decoder.changed_by_step()
        saved = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.decoder.step_all(width)
                for tensor, old in zip(changed, saved, strict=True):
                    tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # records, but runs nothing
            self.decoder.step_all(width)
        return graph
