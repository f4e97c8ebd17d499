"""The interface of a model family: everything that this project needs to know about the structure of a vision-language
model.

A family is one file in this folder with a subclass of `Architecture`, and one line in `registry`. No other file names
the projections, norms or vision tower of a model. To add a family, copy `qwen2_5_vl.py`.

Shapes: B rows, T tokens of each row, D width of the decoder, F width of an image feature, W width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from datamodules.checkpoints.model_folder import ModelError


@dataclass(frozen=True)
class CacheSizes:
    """The size of the keys and values of one token, in all layers."""

    layers: int
    heads: int  # key-value heads
    width: int  # width of a head


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, for `DecoderParts`."""

    attention_norm: nn.Module
    query: nn.Module  # linear with bias, like key and value
    key: nn.Module
    value: nn.Module
    output: nn.Module  # linear without bias, like the three linear layers of the MLP
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    index: int  # index of the layer in a cache
    num_key_heads: int
    head_width: int
    scaling: float  # factor of the attention scores


@dataclass(frozen=True)
class DecoderParts:
    """The modules of a decoder, from which the fast sampling models compute its forward pass.

    Its layers are x += output(attention(attention_norm(x))), then x += down(silu(gate(y)) * up(y)) with y =
    mlp_norm(x). Norms are RMS norms with `weight` and `variance_epsilon`. Queries and keys have no norm. The rotary
    embedding rotates pairs made of the first and the second half of a head.
    """

    layers: Sequence[LayerParts]
    rotary: nn.Module  # (x, positions [3, B, T]) -> cosines and sines [B, T, W], the same for both halves of a head
    norm: nn.Module  # after the last layer


@dataclass(frozen=True)
class SpeedUps:
    """Modules for which a faster forward pass with the same state exists (`layers/accelerate.py`)."""

    norms: Sequence[nn.Module]  # RMS norms with `weight` and `variance_epsilon`
    gated_mlps: Sequence[nn.Module]  # down(silu(gate(x)) * up(x))
    gated_mlp_names: tuple[str, str, str]  # names of gate, up and down in a gated MLP
    patch_embeddings: Sequence[nn.Module]  # a convolution `proj` without bias whose stride equals its kernel size


@dataclass(frozen=True)
class VisionSizes:
    """The numbers from which the operations of a vision tower are counted (`experiments/bench/roofline.py`)."""

    width: int
    patch_weights: int  # number of weights that are applied to each patch
    token_weights: int  # number of weights that are applied to each image token: those of the merger
    merged_patches: int  # patches per image token
    # for each layer, the number of patches that a patch attends to; None: all patches of its image
    windows: tuple[int | None, ...]


class Architecture(ABC):
    """The structure of one model family. It has no state; each method gets the model as argument.

    `model` is the whole transformers module without PEFT's wrapper; its linear layers may be PEFT layers.
    """

    model_type: ClassVar[str]  # `model_type` in config.json
    name: ClassVar[str]  # name of the family in messages
    text_path: ClassVar[str]  # dotted name of the decoder in the model
    vision_path: ClassVar[str]  # dotted name of the vision tower, with its merger
    linear_layers: ClassVar[tuple[str, ...]]  # names of the linear layers in a decoder layer, which LoRA may adapt
    # Names of tensors in published files: (prefix in a file, prefix in the model). The first matching pair is used.
    published_prefixes: ClassVar[tuple[tuple[str, str], ...]]

    def check_attention(self, path: str, model: nn.Module) -> None:
        """Raise ModelError if a decoder layer does not attend to all earlier tokens, but only to a window of them.

        Packed rows and the sampling models of this project would compute it without its window.
        """
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        if others := sorted({*kinds} - {"full_attention"}):
            raise ModelError(
                f"model: {path!r}: its config.json asks for {', '.join(others)} (use_sliding_window), which is not"
                f" supported: published models of {self.name} do without it"
            )

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder: embeddings, layers and final norm."""
        return model.get_submodule(self.text_path)

    def decoder_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder's layers. Each layer is a unit of FSDP and of activation checkpointing."""
        return self.text_model(model).layers

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.vision_path)

    @abstractmethod
    def image_features(self, model: nn.Module, patches: Tensor, grids: Tensor) -> Sequence[Tensor]:
        """Features [tokens, F] of each image.

        The first D numbers of a feature replace the embedding of a token. A family that also adds features to the
        hidden states of later layers (DeepStack) has F > D; `hidden_states` gets the other F - D numbers in
        `inputs_embeds`.

        Args:
            model: the whole model.
            patches: patches of all images, one per row, from the image processor of the family.
            grids: frames, rows and columns of patches of each image, long [images, 3].
        """

    @abstractmethod
    def hidden_states(
        self, model: nn.Module, position_ids: Tensor, inputs_embeds: Tensor, mask: object, cache: object
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, computed by the model's own modules.

        Args:
            model: the whole model.
            position_ids: long [3, B, T]: time, row and column.
            inputs_embeds: [B, T, F]; text tokens have zeros after the first D numbers.
            mask: passed unchanged to the registered attention function as its mask; None: causal.
            cache: its method `update(keys, values, layer)` gets the rotated keys and the values of each layer.
        """

    @abstractmethod
    def cache_sizes(self, model: nn.Module) -> CacheSizes: ...

    @abstractmethod
    def decoder_parts(self, model: nn.Module) -> DecoderParts | None:
        """The modules for the fast sampling models; None if the decoder has another structure than `DecoderParts`."""

    @abstractmethod
    def speed_ups(self, model: nn.Module) -> SpeedUps: ...

    @abstractmethod
    def vision_sizes(self, model: nn.Module) -> VisionSizes:
        """Also works for a model on the meta device."""
