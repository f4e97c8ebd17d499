"""A prompt as chat messages for a server, derived from its tokens: the server must read what the trainer has."""

from __future__ import annotations

import re
from typing import Any

from datamodules.checkpoints.pretrained import load_processor
from datamodules.encoding.chat_request import png_data_url
from datamodules.encoding.encoder import EncodedSample
from datamodules.encoding.images_from_patches import images_from_patches

MARK = "\N{SNOWMAN}"  # stands for the user's turn while the template around it is looked at


class PromptWriter:
    """Messages in OpenAI's form whose rendering by the model's chat template gives a `EncodedSample`'s own tokens.

    They come from the tokens, not from the sample: so whatever prompt style, labels or boxes made them, the server gets
    the same. Images are sent in the size and with the pixels that the policy is given, and survive the server's own
    resizing as they are.
    """

    def __init__(self, processor_path: str) -> None:
        self.processor = load_processor(processor_path)
        self.before, self.after = self._render([{"type": "text", "text": MARK}]).split(MARK)
        rendered = self._render([{"type": "image"}])
        self.image = rendered.removeprefix(self.before).removesuffix(self.after)
        self.placeholders = re.compile(f"(?:{re.escape(self.processor.image_token)})+")

    def messages(self, item: EncodedSample) -> list[dict[str, Any]]:
        """One user turn. Raises ValueError that names the sample if its tokens are not such a turn."""
        text = self.processor.tokenizer.decode(
            item.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = self.placeholders.sub(lambda _: self.processor.image_token, text)
        texts = text.removeprefix(self.before).removesuffix(self.after).split(self.image)
        whole = self.before + self.image.join(texts) + self.after
        if whole != text or len(texts) != len(item.grid_thw) + 1:
            raise ValueError(
                f"sample {item.sample.id!r}: its prompt is no turn with {len(item.grid_thw)} images: {text[:200]!r}"
            )
        images = images_from_patches(item.pixel_values, item.grid_thw, self.processor.image_processor)
        urls = [{"type": "image_url", "image_url": {"url": png_data_url(image)}} for image in images]
        content = [part for text, url in zip(texts, urls, strict=False) for part in (_text(text), url)]
        return [{"role": "user", "content": [part for part in [*content, _text(texts[-1])] if part != _text("")]}]

    def _render(self, content: list[dict[str, Any]]) -> str:
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
