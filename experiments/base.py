"""Pretrain the nano base: a tiny Qwen2.5-VL that grounds, lists and describes in one image, and has never seen two.

    python -m experiments.base --output models/nano-base

Sample i of the stream is a pure function of (seed, i), so a run that is killed goes on from its last checkpoint exactly
as if nothing had happened. Each picture is followed by several questions, side by side (`shared_prefix`): they see the
picture and not each other, so the picture is computed once for all of them. Only answers count in the loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoProcessor, Qwen2_5_VLProcessor

from experiments.muon import Muon
from experiments.nano_model import build_config, build_processor
from experiments.pictures import Picture, PictureEncoder, accuracy
from lightning_modules.qwen_vl import QwenVL, new_model
from lightning_modules.shared_prefix import pack_rows

CHECKPOINT, LOG = "checkpoint.pt", "training_log.jsonl"


@dataclass(frozen=True)
class BaseSettings:
    """Everything that decides what comes out."""

    seed: int = 0
    text_width: int = 192
    text_depth: int = 4
    vision_width: int = 128
    vision_depth: int = 3
    num_images: int = 42_000
    batch_images: int = 24
    grounding_turns: int = 5
    learning_rate: float = 2.5e-3
    warmup: float = 0.02
    decay: float = 0.5  # last part of the run, linear to zero
    max_tokens_per_row: int = 4096
    num_eval: int = 400
    # Where a thing is must be learned before which thing is meant: one at a time first, then up to two, and so on.
    single_images: int = 12_000
    curriculum_images: int = 6_000

    @property
    def num_steps(self) -> int:
        return self.num_images // self.batch_images

    def most_things(self, index: int) -> int:
        """The largest number of things in picture `index`."""
        if index < self.single_images:
            return 1
        return min(5, 2 + (index - self.single_images) // self.curriculum_images)


class PictureStream(IterableDataset):
    """This process's share of each batch of pictures, from batch `start` on."""

    def __init__(
        self, processor: Qwen2_5_VLProcessor, settings: BaseSettings, start: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.processor, self.settings, self.start = processor, settings, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Picture]]:
        settings = self.settings
        encoder = PictureEncoder(self.processor, settings.grounding_turns)
        for batch in range(self.start, settings.num_steps):
            first = batch * settings.batch_images
            yield [
                encoder.picture(f"train:{settings.seed}", index, settings.most_things(index))
                for index in range(first + self.rank, first + settings.batch_images, self.world_size)
            ]


def learning_rate_factor(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """Linear up, flat, linear down to zero."""
    return min(1.0, (step + 1) / max(1, warmup * num_steps), (num_steps - step) / max(1, decay * num_steps))


def batch_loss(policy: QwenVL, pictures: list[Picture], max_tokens: int) -> tuple[float, int]:
    """Negative log-likelihood of all answer tokens of a batch, a sum, and how many they are; adds its gradient."""
    items = [picture.item for picture in pictures]
    features = policy.encode_images(items)
    # The vision tower runs once for the batch; rows add up its gradient here before it goes through the tower.
    leaves = [feature.detach().requires_grad_() for feature in features]
    marks = torch.cat([picture.is_answer for picture in pictures])
    total, seen = 0.0, 0
    for rows in pack_rows(items, [picture.completions for picture in pictures], max_tokens):
        scores = policy.token_log_probs(rows, leaves, ban_tokens=False)
        chosen = marks[seen : seen + len(scores)]
        seen += len(scores)
        loss = -(scores * chosen).sum()
        loss.backward()
        total += loss.item()
    torch.autograd.backward(features, [leaf.grad for leaf in leaves])
    return total, int(marks.sum())


def average_gradients(parameters: list[Tensor], total: float, count: int) -> float:
    """Turn each process's gradient of a sum into that of the mean over all processes; returns the mean loss."""
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor([total, count], dtype=torch.float32)])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    *gradients, total_count = flat.split([*(p.numel() for p in parameters), 2])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient.view_as(parameter) / total_count[1])
    return (total_count[0] / total_count[1]).item()


def build_optimizers(policy: QwenVL, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks, AdamW for embeddings, biases, norms and the patch convolution."""
    named = list(policy.base.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=learning_rate), adamw]


class BaseRun:
    """A run at some step: weights, optimizers and clock; from the folder's checkpoint if there is one."""

    def __init__(self, settings: BaseSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.policy = QwenVL(str(folder), freeze_vision=False)
        self.parameters = list(self.policy.base.parameters())
        self.optimizers = build_optimizers(self.policy, settings.learning_rate)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.encoder = PictureEncoder(self.processor, settings.grounding_turns)
        self.step, seconds = 0, 0.0
        if (folder / CHECKPOINT).exists():
            state = torch.load(folder / CHECKPOINT, weights_only=True)
            self.policy.base.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, seconds = state["step"], state["seconds"]
        self.started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Of training so far, over all attempts."""
        return time.perf_counter() - self.started

    def update(self, pictures: list[Picture]) -> float:
        """One step on this process's share of a batch; returns the loss of the whole batch before it."""
        settings = self.settings
        factor = learning_rate_factor(self.step, settings.num_steps, settings.warmup, settings.decay)
        loss = average_gradients(self.parameters, *batch_loss(self.policy, pictures, settings.max_tokens_per_row))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        unfinished = self.folder / f"{CHECKPOINT}.unfinished"
        state = {
            "model": self.policy.base.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, unfinished)
        unfinished.rename(self.folder / CHECKPOINT)

    def log(self, losses: Sequence[float], num_eval: int) -> None:
        """Append the mean of the `losses` since the last record and, with `num_eval` questions, the accuracy."""
        record: dict[str, float] = {
            "step": self.step,
            "images": self.step * self.settings.batch_images,
            "loss": sum(losses) / len(losses),
            "seconds": round(self.seconds, 1),
        }
        if num_eval:
            record |= accuracy(self.policy, self.encoder, num_eval)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def finish(self, losses: Sequence[float]) -> None:
        """Save the model, write the last record, which marks the folder as finished, and drop the checkpoint."""
        self.policy.base.save_pretrained(self.folder)
        if losses:
            self.log(losses, self.settings.num_eval)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def is_finished(settings: BaseSettings, folder: Path) -> bool:
    """Whether the base of these settings is there. Raises ValueError if `folder` holds a model of another origin."""
    if not (folder / "config.json").exists():
        return False
    if not (folder / LOG).exists():
        raise ValueError(f"{folder} holds a model without {LOG}: choose another --output")
    header, *records = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    old, new = header["settings"], asdict(settings)
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        values = ", ".join(f"{name}={old.get(name)} there and {new.get(name)} here" for name in changed)
        raise ValueError(f"{folder} holds a base of other settings ({values}): remove it or choose another --output")
    return bool(records) and records[-1]["step"] == settings.num_steps and not (folder / CHECKPOINT).exists()


def prepare_folder(settings: BaseSettings, folder: Path) -> None:
    """The untrained model, tokenizer and log in `folder`, or of an interrupted run its log up to the checkpoint."""
    if is_finished(settings, folder):
        return
    if (folder / CHECKPOINT).exists():
        step = torch.load(folder / CHECKPOINT, weights_only=True, mmap=True)["step"]
        header, *records = (folder / LOG).read_text().splitlines(keepends=True)
        (folder / LOG).write_text(header + "".join(line for line in records if json.loads(line)["step"] <= step))
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    processor = build_processor(settings.seed)
    (folder / LOG).write_text(json.dumps({"settings": asdict(settings)}) + "\n")
    processor.save_pretrained(folder)
    sizes = (settings.text_width, settings.text_depth), (settings.vision_width, settings.vision_depth)
    new_model(build_config(processor.tokenizer, *sizes)).save_pretrained(folder)


def train(
    settings: BaseSettings, folder: Path, save_every: int = 100, eval_every: int = 400, log_every: int = 20
) -> QwenVL:
    """Train, or go on training, in `folder`: the model's files, the log and, until the end, a checkpoint.

    A finished folder is left as it is. `save_every` must be a multiple of `log_every`, so that no loss is left out of
    the log of a resumed run.
    """
    if save_every % log_every:
        raise ValueError(f"save_every={save_every} must be a multiple of log_every={log_every}")
    torch.set_flush_denormal(True)  # optimizer moments of rare tokens decay into denormals, which are slow on a CPU
    parallel = distributed.is_initialized()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
    if rank == 0:
        prepare_folder(settings, folder)
    if parallel:
        distributed.barrier()
    run = BaseRun(settings, folder)
    if is_finished(settings, folder):
        print(f"{folder} is finished: remove it or choose another --output to train anew")
        return run.policy
    losses: list[float] = []
    stream = PictureStream(run.processor, settings, run.step, rank, world_size)
    for pictures in DataLoader(stream, batch_size=None, num_workers=0):
        losses.append(run.update(pictures))
        if rank == 0 and run.step < settings.num_steps:
            if run.step % log_every == 0:
                run.log(losses, 128 if run.step % eval_every == 0 else 0)
                losses = []
            if run.step % save_every == 0:
                run.save()
    if rank == 0:
        run.finish(losses)
    return run.policy


def train_process(rank: int, world_size: int, rendezvous: str, settings: BaseSettings, folder: Path) -> None:
    """One of `world_size` processes, each with one thread: on a CPU they are faster than one process with threads."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    train(settings, folder)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/nano-base"))
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes; changes rounding only")
    for name, default in asdict(BaseSettings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    output, processes = arguments.pop("output"), arguments.pop("processes")
    settings = BaseSettings(**arguments)
    if processes == 1:
        train(settings, output)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train_process, (processes, f"file://{folder}/rendezvous", settings, output), processes)


if __name__ == "__main__":
    main()
