"""The seam for a model family: all that this project knows of the inside of a vision-language model.

A family is one file beside this one with a subclass of `Architecture`, and one line in `registry`. No other file names
a projection, a norm or the vision tower of a model. `qwen2_5_vl.py` is the example to copy.

Shapes: B rows, T tokens of each row, D width of the decoder, F width of an image feature, W width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class CacheSizes:
    """Keys and values of one token, in all layers."""

    layers: int
    heads: int  # key-value heads
    width: int  # of a head


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, for `DecoderParts`."""

    attention_norm: nn.Module
    query: nn.Module  # linear with bias, as key and value
    key: nn.Module
    value: nn.Module
    output: nn.Module  # linear without bias, as the three of the MLP
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    index: int  # by which a cache knows the layer
    num_key_heads: int
    head_width: int
    scaling: float  # of the attention scores


@dataclass(frozen=True)
class DecoderParts:
    """A decoder that the fast sampling models can compute from its modules alone.

    Its layers are x += output(attention(attention_norm(x))), then x += down(silu(gate(y)) * up(y)) with
    y = mlp_norm(x). Norms are RMS norms with `weight` and `variance_epsilon`. Queries and keys have no norm of their
    own; the two halves of a head are rotated against each other.
    """

    layers: Sequence[LayerParts]
    rotary: nn.Module  # (x, positions [3, B, T]) -> cosines and sines [B, T, W], the same for both halves of a head
    norm: nn.Module  # behind the last layer


@dataclass(frozen=True)
class SpeedUps:
    """Modules that have a faster forward pass with the same state (`layers/accelerate.py`)."""

    norms: Sequence[nn.Module]  # RMS norms with `weight` and `variance_epsilon`
    gated_mlps: Sequence[nn.Module]  # down(silu(gate(x)) * up(x))
    gated_mlp_names: tuple[str, str, str]  # of gate, up and down in a gated MLP
    patch_embeddings: Sequence[nn.Module]  # a convolution `proj` without bias that steps by the length of its kernel


@dataclass(frozen=True)
class VisionSizes:
    """What the operations of a vision tower are counted from (`experiments/bench/roofline.py`)."""

    width: int
    patch_weights: int  # that each patch meets
    token_weights: int  # that each token of the decoder meets: the merger's
    merged_patches: int  # patches of a token
    windows: tuple[int | None, ...]  # patches that a patch sees in each layer; None: all of its image


class Architecture(ABC):
    """What one family of models is made of. It has no state of its own: each method is given the model.

    `model` is the whole transformers module without PEFT's wrapper; its linear layers may be PEFT's.
    """

    model_type: ClassVar[str]  # in config.json
    name: ClassVar[str]  # in messages
    text_path: ClassVar[str]  # dotted name of the decoder in the model
    vision_path: ClassVar[str]  # dotted name of the vision tower, with its merger
    linear_layers: ClassVar[tuple[str, ...]]  # names of the linear layers in a decoder layer, which LoRA may adapt
    # Tensors in published files: (prefix in a file, prefix in the model); the first pair that gives a name wins.
    published_prefixes: ClassVar[tuple[tuple[str, str], ...]]

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder: embeddings, layers and last norm."""
        return model.get_submodule(self.text_path)

    def decoder_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder's layers. Each is a unit of FSDP and of activation checkpointing."""
        return self.text_model(model).layers

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.vision_path)

    @abstractmethod
    def image_features(self, model: nn.Module, patches: Tensor, grids: Tensor) -> Sequence[Tensor]:
        """Features [tokens, F] of each image.

        The first D numbers of a feature replace a token's embedding. A family that also adds features to the states of
        later layers (DeepStack) has F > D; `hidden_states` gets the other numbers in `inputs_embeds`.

        Args:
            model: the whole model.
            patches: of all images, one a row, as the family's image processor makes them.
            grids: frames, rows and columns of patches of each image, long [images, 3].
        """

    @abstractmethod
    def hidden_states(
        self, model: nn.Module, position_ids: Tensor, inputs_embeds: Tensor, mask: object, cache: object
    ) -> Tensor:
        """Hidden states [B, T, D] behind the last norm, computed by the model's own modules.

        Args:
            model: the whole model.
            position_ids: long [3, B, T]: time, row and column.
            inputs_embeds: [B, T, F]; behind the first D numbers a text token has zeros.
            mask: handed on untouched to the registered attention function, as its mask; None: causal.
            cache: its method `update(keys, values, layer)` gets each layer's keys, rotated, and values.
        """

    @abstractmethod
    def cache_sizes(self, model: nn.Module) -> CacheSizes: ...

    @abstractmethod
    def decoder_parts(self, model: nn.Module) -> DecoderParts | None:
        """The modules that the fast sampling models read; None if the decoder computes anything else."""

    @abstractmethod
    def speed_ups(self, model: nn.Module) -> SpeedUps: ...

    @abstractmethod
    def vision_sizes(self, model: nn.Module) -> VisionSizes:
        """May be asked of a model on the meta device."""
