"""Pretrain the nano base: a tiny Qwen2.5-VL that grounds, lists and describes in one image, and has never seen two.

    python -m experiments.base --output models/nano-base

Sample i of the stream is a pure function of (seed, i), so a run that is killed goes on from its last checkpoint exactly
as if nothing had happened. Each picture is followed by several questions, side by side (`shared_prefix`): they see the
picture and not each other, so the picture is computed once for all of them. Only answers count in the loss.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from datamodules.answers import ParsedAnswer, parse_answer
from datamodules.batches import PromptItem, mrope_positions
from datamodules.boxes import Convention, ImageGeometry, iou
from datamodules.samples import BoxAnswer, ImagePart, Sample, TextPart
from datamodules.synthetic.single_image import Turn, single_scene, single_turns
from datamodules.synthetic.world import draw_scene
from experiments.muon import Muon
from experiments.nano_model import build_config, build_processor
from lightning_modules.qwen_vl import QwenVL, new_model
from lightning_modules.rollouts import NativeEngine, RolloutSettings
from lightning_modules.shared_prefix import pack_rows

HELD_OUT = "held-out"  # names the evaluation stream; training's is "train"


@dataclass(frozen=True)
class BaseSettings:
    """Everything that decides what comes out. `text` and `vision` are (width, depth)."""

    seed: int = 0
    text_width: int = 192
    text_depth: int = 4
    vision_width: int = 128
    vision_depth: int = 3
    num_images: int = 48_000
    batch_images: int = 32
    grounding_turns: int = 3
    learning_rate: float = 2e-3
    warmup: float = 0.02
    decay: float = 0.5  # last part of the run, linear to zero
    max_tokens_per_row: int = 512
    num_eval: int = 400


@dataclass(frozen=True)
class Picture:
    """One picture as a prefix, with its turns as completions and, for each token of those, whether it is an answer."""

    item: PromptItem
    completions: tuple[Tensor, ...]
    is_answer: Tensor
    turns: tuple[Turn, ...]


class PictureEncoder:
    """Renders and tokenizes picture i of a stream. The text is what the chat template gives (a test compares)."""

    def __init__(self, processor: Any, grounding_turns: int) -> None:
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id = processor.image_token_id
        self.grounding_turns = grounding_turns
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\0"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, add_vision_id=True, tokenize=False)
        before, after = text.split("\0")
        self.before, self.after = self.encode(before), self.encode(after)
        self.end = self.encode("<|im_end|>")

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def picture(self, stream: str, index: int) -> Picture:
        rng = random.Random(f"{stream}:{index}")
        scene = single_scene(rng)
        features = self.image_processor(images=[draw_scene(scene)], return_tensors="pt")
        grid = features["image_grid_thw"]
        rows, columns = grid[0, 1:].tolist()
        geometry = ImageGeometry.from_grid(scene.size, (rows, columns), self.image_processor.patch_size)
        turns = tuple(single_turns(rng, scene, geometry, Convention.ABSOLUTE, self.grounding_turns))
        merge = self.image_processor.merge_size
        repeats = torch.where(self.before == self.image_token_id, rows * columns // merge**2, 1)
        prefix = self.before.repeat_interleave(repeats)
        positions, next_position = mrope_positions(prefix, grid, self.image_token_id, merge)
        name = scene.content_hash()
        item = PromptItem(
            sample=Sample(name, "nano", "single", (name,), (ImagePart(0), TextPart("?")), BoxAnswer(0, scene.things[0].box, "")),
            input_ids=prefix,
            positions=positions,
            next_position=next_position,
            pixel_values=features["pixel_values"],
            grid_thw=grid,
            geometries=(geometry,),
            completion_ids=None,
            image_keys=(name,),
        )
        completions, marks = [], []
        for turn in turns:
            question = torch.cat([self.encode(turn.question), self.after])
            answer = torch.cat([self.encode(turn.answer), self.end])
            completions.append(torch.cat([question, answer]))
            marks += [torch.zeros(len(question), dtype=torch.bool), torch.ones(len(answer), dtype=torch.bool)]
        return Picture(item, tuple(completions), torch.cat(marks), turns)

    def prompt(self, picture: Picture, turn: int) -> PromptItem:
        """The picture with one of its questions, ready for an answer."""
        from dataclasses import replace

        item = picture.item
        extra = torch.cat([self.encode(picture.turns[turn].question), self.after])
        places = item.next_position + torch.arange(len(extra))
        return replace(
            item,
            input_ids=torch.cat([item.input_ids, extra]),
            positions=torch.cat([item.positions, places.expand(3, -1)], dim=1),
            next_position=item.next_position + len(extra),
        )


class PictureStream(IterableDataset):
    """Batches of pictures from batch `start` on; worker w of W makes batches w, w + W, ..."""

    def __init__(self, processor: Any, settings: BaseSettings, start: int) -> None:
        self.processor, self.settings, self.start = processor, settings, start

    def __iter__(self) -> Iterator[list[Picture]]:
        settings = self.settings
        encoder = PictureEncoder(self.processor, settings.grounding_turns)
        for batch in range(self.start, settings.num_images // settings.batch_images):
            first = batch * settings.batch_images
            yield [
                encoder.picture(f"train:{settings.seed}", index)
                for index in range(first, first + settings.batch_images)
            ]


def learning_rate_factor(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """Linear up, flat, linear down to zero."""
    return min(1.0, (step + 1) / max(1, warmup * num_steps), (num_steps - step) / max(1, decay * num_steps))


def batch_loss(policy: QwenVL, pictures: list[Picture], max_tokens: int) -> float:
    """Mean negative log-likelihood of the answer tokens of a batch; adds its gradient row by row."""
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
        loss = -(scores * chosen).sum() / marks.sum()
        loss.backward()
        total += loss.item()
    torch.autograd.backward(features, [leaf.grad for leaf in leaves])
    return total


def accuracy(policy: QwenVL, encoder: PictureEncoder, num_eval: int) -> dict[str, float]:
    """Greedy single-image grounding on held-out scenes: Acc@0.5 (IoU > 0.5), mean IoU and parse failures, in per cent."""
    pictures = [encoder.picture(HELD_OUT, index) for index in range(num_eval)]
    items = [encoder.prompt(picture, 0) for picture in pictures]
    settings = RolloutSettings(group_size=1, temperature=1.0, max_new_tokens=48, greedy=True, batch_prompts=64)
    scores, failures = [], 0
    for picture, item, (rollout,) in zip(pictures, items, NativeEngine(policy).generate(items, settings), strict=True):
        answer = parse_answer(rollout.text)
        if isinstance(answer, ParsedAnswer):
            box = item.geometries[0].to_unit(answer.boxes[0].values, Convention.ABSOLUTE)
            scores.append(iou(box, picture.turns[0].box))
        else:
            failures += 1
            scores.append(0.0)
    return {
        "single_image_acc": 100 * sum(score > 0.5 for score in scores) / num_eval,
        "single_image_iou": 100 * sum(scores) / num_eval,
        "parse_failures": 100 * failures / num_eval,
    }


def build_optimizers(policy: QwenVL, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks, AdamW for embeddings, biases, norms and the patch convolution."""
    named = list(policy.base.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [Muon(matrices, lr=learning_rate), torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def train(settings: BaseSettings, folder: Path, save_every: int = 100, eval_every: int = 400) -> QwenVL:
    """Train, or go on training, in `folder`: the model's files, `training_log.jsonl` and, until the end, a checkpoint."""
    torch.set_flush_denormal(True)  # optimizer moments of rare tokens decay into denormals, which are slow on a CPU
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "training_log.jsonl"
    if not (folder / "config.json").exists():
        torch.manual_seed(settings.seed)
        processor = build_processor(settings.seed)
        processor.save_pretrained(folder)
        sizes = (settings.text_width, settings.text_depth), (settings.vision_width, settings.vision_depth)
        new_model(build_config(processor.tokenizer, *sizes)).save_pretrained(folder)
        log.write_text(json.dumps({"settings": asdict(settings)}) + "\n")
    policy = QwenVL(str(folder), freeze_vision=False)
    optimizers = build_optimizers(policy, settings.learning_rate)
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        policy.base.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
    num_steps = settings.num_images // settings.batch_images
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    encoder = PictureEncoder(processor, settings.grounding_turns)
    loader = DataLoader(PictureStream(processor, settings, step), batch_size=None, num_workers=0)
    started, losses = time.perf_counter() - seconds, []
    for pictures in loader:
        factor = learning_rate_factor(step, num_steps, settings.warmup, settings.decay)
        losses.append(batch_loss(policy, pictures, settings.max_tokens_per_row))
        torch.nn.utils.clip_grad_norm_(policy.base.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seconds = time.perf_counter() - started
        if step % 20 == 0 or step == num_steps:
            record = {"step": step, "images": step * settings.batch_images, "loss": sum(losses) / len(losses), "seconds": round(seconds, 1)}
            losses = []
            if step % eval_every == 0 or step == num_steps:
                record |= accuracy(policy, encoder, settings.num_eval if step == num_steps else 128)
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
        if step % save_every == 0:
            unfinished = checkpoint.with_suffix(".unfinished")
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": policy.base.state_dict(), "optimizers": states, "step": step, "seconds": seconds}, unfinished)
            unfinished.rename(checkpoint)
    policy.base.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/nano-base"))
    for name, default in asdict(BaseSettings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    train(BaseSettings(**arguments), output)


if __name__ == "__main__":
    main()
