"""Convert the tokens of a prompt to chat messages for a server, so that the server reads exactly the same tokens."""

from __future__ import annotations

import re
from typing import Any

from datamodules.checkpoints.pretrained import load_processor
from datamodules.encoding.chat_request import png_data_url
from datamodules.encoding.encoder import EncodedSample
from datamodules.encoding.images_from_patches import images_from_patches

MARK = "\N{SNOWMAN}"  # a placeholder for the user's turn, to find the text of the template around it


class PromptWriter:
    """Messages in OpenAI's format. The model's chat template renders them to exactly the tokens of an `EncodedSample`.

    They are made from the tokens, not from the sample, so they are right for any prompt style, labels and boxes. Images
    are sent with the resized pixels that the policy gets, and the server's own resizing does not change them.
    """

    def __init__(self, processor_path: str) -> None:
        self.processor = load_processor(processor_path)
        self.before, self.after = self._render([{"type": "text", "text": MARK}]).split(MARK)
        rendered = self._render([{"type": "image"}])
        self.image = rendered.removeprefix(self.before).removesuffix(self.after)
        self.placeholders = re.compile(f"(?:{re.escape(self.processor.image_token)})+")

    def messages(self, item: EncodedSample) -> list[dict[str, Any]]:
        """One user turn. Raises ValueError that names the sample if its tokens are not one user turn."""
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
