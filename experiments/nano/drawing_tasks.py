"""Pictures of the synthetic dataset with their questions, for training and evaluating the base model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor

from datamodules.encoding.encoder import EncodedSample
from datamodules.encoding.mrope import mrope_positions
from datamodules.samples.boxes import BoxFormat, ImageSizes
from datamodules.samples.sample import BoxAnswer, ImagePart, Sample, TextPart
from datamodules.samples.scores import score_text
from datamodules.synthetic.interleaved import MOST_PICTURES, interleaved_scenes, interleaved_turns
from datamodules.synthetic.single_image import Turn, single_scene, single_turns
from datamodules.synthetic.world import Scene, draw_scene
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.rollouts.base import RolloutRequest
from lightning_modules.rollouts.native.engine import NativeEngine

HELD_OUT = "held-out"  # name of the stream for evaluation; those of training are "train:<seed>", "interleaved:<seed>"


@dataclass(frozen=True)
class PictureSet:
    """One or several pictures, encoded as a common prefix for all conversations about them."""

    item: EncodedSample  # the conversation up to and including the pictures
    completions: tuple[Tensor, ...]  # long, one for each conversation: question, answer, <|im_end|>, next question, …
    is_answer: Tensor  # bool [tokens of all completions]: whether the token belongs to an answer
    conversations: tuple[tuple[Turn, ...], ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The first turn of each conversation."""
        return tuple(turns[0] for turns in self.conversations)


class PictureEncoder:
    """Draws and tokenizes set i of a stream.

    For speed, it joins pieces that are tokenized separately. A test shows that the result equals the chat template's.

    Args:
        processor: of the nano model.
        grounding_turns: grounding questions about one set of pictures.
    """

    def __init__(self, processor: Qwen2_5_VLProcessor, grounding_turns: int) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id = processor.image_token_id
        self.grounding_turns = grounding_turns
        # The template's text before the first question, by the number of pictures, and after each question.
        self.before, after = zip(*(self._around(count) for count in range(1, MOST_PICTURES + 1)), strict=True)
        self.after = after[0]
        self.end, self.next_turn = self.encode("<|im_end|>"), self.encode("\n<|im_start|>user\n")
        self.pieces = _pieces(processor.tokenizer)

    def _around(self, count: int) -> tuple[Tensor, Tensor]:
        """The token ids before and after the question, with `count` pictures before it."""
        # The question is marked by a character that no question has.
        parts = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": "\0"}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, add_vision_id=True, tokenize=False
        )
        before, after = text.split("\0")
        return self.encode(before), self.encode(after)

    def encode(self, text: str) -> Tensor:
        """The token ids of a text, long [tokens]."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def picture(self, stream: str, index: int) -> PictureSet:
        """One picture with its questions, number `index` of a stream: a pure function of the two arguments."""
        rng = random.Random(f"{stream}:{index}")
        scene = single_scene(rng)
        item = self._prefix((scene,))
        turns = single_turns(rng, scene, item.image_sizes[0], BoxFormat.ABSOLUTE_PIXELS, self.grounding_turns)
        return self._picture_set(item, [(turn,) for turn in (*turns, self._repeating(rng))])

    def interleaved(self, stream: str, index: int) -> PictureSet:
        """Several pictures with their conversations, number `index` of a stream: a pure function of the arguments.

        Every fourth set is a single picture as in stage 2, so that the model does not forget stage 2.
        """
        if index % 4 == 0:
            return self.picture(stream, index)
        rng = random.Random(f"{stream}:{index}")
        scenes = interleaved_scenes(rng)
        item = self._prefix(scenes)
        conversations = interleaved_turns(
            rng, scenes, item.image_sizes, BoxFormat.ABSOLUTE_PIXELS, self.grounding_turns
        )
        return self._picture_set(item, [*conversations, (self._repeating(rng),)])

    def _picture_set(self, item: EncodedSample, conversations: Sequence[tuple[Turn, ...]]) -> PictureSet:
        completions, marks = [], []
        for turns in conversations:
            pieces = []
            for turn in turns:
                question = torch.cat([*([self.next_turn] if pieces else []), self.encode(turn.question), self.after])
                answer = torch.cat([self.encode(turn.answer), self.end])
                pieces += [question, answer]
                marks += [torch.zeros(len(question), dtype=torch.bool), torch.ones(len(answer), dtype=torch.bool)]
            completions.append(torch.cat(pieces))
        return PictureSet(item, tuple(completions), torch.cat(marks), tuple(conversations))

    def _repeating(self, rng: random.Random) -> Turn:
        """A turn that asks to repeat a random text, so that every token of the vocabulary is sometimes an answer.

        A real base model learns this from web text. A token that was never an answer has an output embedding like that
        of all other such tokens. LoRA does not change embeddings, so a policy could never become sure of such a token,
        for example <think>.
        """
        pieces = rng.choices(self.pieces, k=rng.randint(4, 12))
        if rng.random() < 0.5:
            pieces.append(chr(rng.randrange(0xA1, 0xD800)))  # a character that the tokenizer spells in single bytes
        text = "".join(pieces).strip()
        return Turn("repeating", f"Output: {text}", text)

    def _prefix(self, scenes: Sequence[Scene]) -> EncodedSample:
        """The conversation up to and including the pictures, encoded."""
        features = self.image_processor(images=[draw_scene(scene) for scene in scenes], return_tensors="pt")
        grid = features["image_grid_thw"]
        merge = self.image_processor.merge_size
        # One placeholder for each merged patch.
        before = self.before[len(scenes) - 1]
        repeats = torch.ones_like(before)
        repeats[before == self.image_token_id] = grid.prod(dim=1) // merge**2
        prefix = before.repeat_interleave(repeats)
        positions, next_position = mrope_positions(prefix, grid, self.image_token_id, merge)
        names = tuple(scene.content_hash() for scene in scenes)
        parts, answer = (*map(ImagePart, range(len(scenes))), TextPart("?")), BoxAnswer(0, scenes[0].things[0].box, "")
        patch = self.image_processor.patch_size
        return EncodedSample(
            sample=Sample(names[0], "nano", "pictures", names, parts, answer),
            input_ids=prefix,
            positions=positions,
            next_position=next_position,
            pixel_values=features["pixel_values"],
            grid_thw=grid,
            image_sizes=tuple(
                ImageSizes.from_grid(scene.size, tuple(rows_columns), patch)
                for scene, rows_columns in zip(scenes, grid[:, 1:].tolist(), strict=True)
            ),
            completion_ids=None,
            image_keys=names,
        )

    def prompt(self, picture: PictureSet, turn: int) -> EncodedSample:
        """The pictures with the first question of conversation number `turn`, as a prompt for an answer."""
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
    ious, failures = _grounding(policy, encoder, [encoder.picture(HELD_OUT, index) for index in range(num_eval)])
    return {
        "single_image_acc": 100 * sum(iou > 0.5 for iou in ious) / num_eval,
        "single_image_iou": 100 * sum(ious) / num_eval,
        "parse_failures": 100 * failures / num_eval,
    }


def named_picture_accuracy(policy: QwenVL, encoder: PictureEncoder, num_eval: int) -> dict[str, float]:
    """Greedy grounding of "the X in picture k" on `num_eval` held-out sets of 2 to 6 pictures: Acc@0.5 in per cent."""
    indices = [4 * (index // 3) + 1 + index % 3 for index in range(num_eval)]  # without the single pictures
    ious, _ = _grounding(policy, encoder, [encoder.interleaved(HELD_OUT, index) for index in indices])
    return {"named_picture_acc": 100 * sum(iou > 0.5 for iou in ious) / num_eval}


def _grounding(policy: QwenVL, encoder: PictureEncoder, sets: Sequence[PictureSet]) -> tuple[list[float], int]:
    """IoU of the greedy answer to the first question of each set, and the number of answers without a box."""
    items = [encoder.prompt(pictures, 0) for pictures in sets]
    rollouts = NativeEngine(policy).generate(
        RolloutRequest.for_evaluation(items, max_new_tokens=48, prompts_per_batch=64)
    )
    scores = [
        score_text(rollout.text, BoxAnswer(turn.image, turn.box, ""), item.image_sizes, BoxFormat.ABSOLUTE_PIXELS)
        for turn, item, (rollout,) in zip((pictures.turns[0] for pictures in sets), items, rollouts, strict=True)
    ]
    return [score.iou for score in scores], sum(score.failure is not None for score in scores)
