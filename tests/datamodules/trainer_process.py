"""A process that trains on MultiImageData as far as it is told and saves its state after every batch.

    python trainer_process.py SHARDS STATE_FILE NUM_WORKERS STOP_AT_BATCH [RANK WORLD_SIZE RENDEZVOUS_FILE]

SHARDS is a source, or a mapping {source: weight} as JSON.

It waits to be killed once STOP_AT_BATCH batches are saved (all processes together). "Saved" is an atomic rewrite of
STATE_FILE with the data state and the ids trained on, as a checkpoint holds both stream and weights.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datamodules.multi_image import MultiImageData
from datamodules.samples.sample import LoadedSample

NUM_EPOCHS = 3


class NoEncoder:
    processor, answer_form = None, "one_box"

    def encode(self, loaded: LoadedSample) -> LoadedSample:
        return loaded


def make_data(shards: str, num_workers: int, rank: int = 0, world_size: int = 1) -> MultiImageData:
    sources = json.loads(shards) if shards.startswith("{") else shards
    data = MultiImageData(sources, processor="unused", batch_size=3, num_workers=num_workers, seed=5, shuffle_buffer=5)
    data.encoder = NoEncoder()
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def train(data: MultiImageData, saved: dict, state_file: Path, stop_at: int) -> None:
    """Continue from `saved` {"state", "ids" of every batch}; `stop_at` 0 trains to the end."""
    if saved["state"]:
        data.load_state_dict(saved["state"])
    loader = data.train_dataloader()
    while len(saved["ids"]) < NUM_EPOCHS * len(loader):
        for batch in loader:
            data.mark_trained(batch)
            saved["ids"].append(batch.sample_ids)
            saved["state"] = data.state_dict()
            partial = state_file.with_suffix(".partial")
            partial.write_text(json.dumps(saved))
            os.replace(partial, state_file)
            if len(saved["ids"]) == stop_at:
                print("saved", flush=True)
                time.sleep(600)


def main() -> None:
    shards, state_file, num_workers, stop_at, *rest = sys.argv[1:]
    rank, world_size = 0, 1
    if rest:
        import torch.distributed

        rank, world_size = int(rest[0]), int(rest[1])
        torch.distributed.init_process_group("gloo", f"file://{rest[2]}", rank=rank, world_size=world_size)
    path = Path(state_file)
    saved = json.loads(path.read_text()) if path.exists() else {"state": None, "ids": []}
    train(make_data(shards, int(num_workers), rank, world_size), saved, path, int(stop_at))


if __name__ == "__main__":
    main()
