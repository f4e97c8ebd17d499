"""Pictures of the synthetic dataset with their questions, for training and evaluating the base model."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor

from datamodules.encoding.encoder import EncodedSample
from datamodules.encoding.mrope import mrope_positions
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, ImagePart, Sample, TextPart
from datamodules.samples.scores import score_text
from datamodules.synthetic.single_image import Turn, single_scene, single_turns
from datamodules.synthetic.world import Scene, draw_scene
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutRequest
from lightning_modules.rollouts.native.engine import NativeEngine

HELD_OUT = "held-out"  # name of the stream of pictures for evaluation; the training stream is "train:<seed>"


@dataclass(frozen=True)
class Picture:
    """One picture, encoded as a common prefix for all its questions."""

    item: EncodedSample  # the conversation up to and including the picture
    completions: tuple[Tensor, ...]  # long, one for each turn: question, answer, <|im_end|>
    is_answer: Tensor  # bool [tokens of all completions]: whether the token belongs to an answer
    turns: tuple[Turn, ...]


class PictureEncoder:
    """Draws and tokenizes picture i of a stream.

    For speed, it joins pieces that are tokenized separately. A test shows that the result equals the chat template's.

    Args:
        processor: processor of the nano model.
        grounding_turns: number of grounding questions about one picture.
    """

    def __init__(self, processor: Qwen2_5_VLProcessor, grounding_turns: int) -> None:
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id = processor.image_token_id
        self.grounding_turns = grounding_turns
        # The template's text before and after the question, which is marked by a character that no question has.
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\0"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, add_vision_id=True, tokenize=False)
        before, after = text.split("\0")
        self.before, self.after = self.encode(before), self.encode(after)
        self.end = self.encode("<|im_end|>")
        self.pieces = _pieces(processor.tokenizer)

    def encode(self, text: str) -> Tensor:
        """The token ids of a text, long [tokens]."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def picture(self, stream: str, index: int) -> Picture:
        """Picture `index` of a stream: a pure function of the two arguments."""
        rng = random.Random(f"{stream}:{index}")
        scene = single_scene(rng)
        item = self._prefix(scene)
        turns = single_turns(rng, scene, item.image_sizes[0], BoxFormat.ABSOLUTE_PIXELS, self.grounding_turns)
        turns.append(self._repeating(rng))
        completions, marks = [], []
        for turn in turns:
            question = torch.cat([self.encode(turn.question), self.after])
            answer = torch.cat([self.encode(turn.answer), self.end])
            completions.append(torch.cat([question, answer]))
            marks += [torch.zeros(len(question), dtype=torch.bool), torch.ones(len(answer), dtype=torch.bool)]
        return Picture(item, tuple(completions), torch.cat(marks), tuple(turns))

    def _repeating(self, rng: random.Random) -> Turn:
        """A turn that asks to repeat a random text, so that every token of the vocabulary is sometimes an answer.

        A real base model learns this from web text. All tokens that were never an answer have similar output
        embeddings. LoRA does not change embeddings, so a policy could never predict such a token with high probability,
        for example <think>.
        """
        pieces = rng.choices(self.pieces, k=rng.randint(4, 12))
        if rng.random() < 0.5:
            pieces.append(chr(rng.randrange(0xA1, 0xD800)))  # a character that the tokenizer encodes as single bytes
        text = "".join(pieces).strip()
        return Turn("repeating", f"Output: {text}", text)

    def _prefix(self, scene: Scene) -> EncodedSample:
        """The conversation up to and including the picture, encoded."""
        features = self.image_processor(images=[draw_scene(scene)], return_tensors="pt")
        grid = features["image_grid_thw"]
        rows, columns = grid[0, 1:].tolist()
        merge = self.image_processor.merge_size
        # One placeholder for each merged patch.
        repeats = torch.where(self.before == self.image_token_id, rows * columns // merge**2, 1)
        prefix = self.before.repeat_interleave(repeats)
        positions, next_position = mrope_positions(prefix, grid, self.image_token_id, merge)
        name = scene.content_hash()
        parts, answer = (ImagePart(0), TextPart("?")), BoxAnswer(0, scene.things[0].box, "")
        return EncodedSample(
            sample=Sample(name, "nano", "single", (name,), parts, answer),
            input_ids=prefix,
            positions=positions,
            next_position=next_position,
            pixel_values=features["pixel_values"],
            grid_thw=grid,
            image_sizes=(ImageSizes.from_grid(scene.size, (rows, columns), self.image_processor.patch_size),),
            completion_ids=None,
            image_keys=(name,),
        )

    def prompt(self, picture: Picture, turn: int) -> EncodedSample:
        """The picture with question number `turn`, as a prompt for an answer."""
        item = picture.item
        extra = torch.cat([self.encode(picture.turns[turn].question), self.after])
        places = item.next_position + torch.arange(len(extra))  # text: the same position on all three axes
        return replace(
            item,
            input_ids=torch.cat([item.input_ids, extra]),
            positions=torch.cat([item.positions, places.expand(3, -1)], dim=1),
            next_position=item.next_position + len(extra),
        )


def _pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of all tokens that are valid text alone, in the order of the vocabulary, without special tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special]
    return [text for text in texts if text and "\ufffd" not in text]


def accuracy(policy: QwenVL, encoder: PictureEncoder, num_eval: int) -> dict[str, float]:
    """Greedy single-image grounding on `num_eval` held-out scenes, in per cent: Acc@0.5 (IoU > 0.5), mean IoU, and the
    share of answers that could not be parsed."""
    pictures = [encoder.picture(HELD_OUT, index) for index in range(num_eval)]
    items = [encoder.prompt(picture, 0) for picture in pictures]
    rollouts = NativeEngine(policy).generate(
        RolloutRequest.for_evaluation(items, max_new_tokens=48, prompts_per_batch=64)
    )
    scores = [
        score_text(rollout.text, BoxAnswer(0, picture.turns[0].box, ""), item.image_sizes, BoxFormat.ABSOLUTE_PIXELS)
        for picture, item, (rollout,) in zip(pictures, items, rollouts, strict=True)
    ]
    return {
        "single_image_acc": 100 * sum(score.iou > 0.5 for score in scores) / num_eval,
        "single_image_iou": 100 * sum(score.iou for score in scores) / num_eval,
        "parse_failures": 100 * sum(score.failure is not None for score in scores) / num_eval,
    }
