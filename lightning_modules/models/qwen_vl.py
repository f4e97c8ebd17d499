"""The policy: a vision-language model with its tokenizer, adapter and reference.

The model's structure is in its `Architecture`, faster layers in `layers/accelerate.py` and `inference`.
`datamodules/checkpoints/pretrained.py` loads it.

Shapes: N target tokens, D hidden width, L tokens of a packed row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from datamodules.checkpoints.model_folder import check_model
from datamodules.checkpoints.pretrained import load_model, load_tokenizer, skeleton
from datamodules.encoding.encoder import EncodedSample
from datamodules.persistence.problems import Problems
from lightning_modules.models.activation_checkpointing import ActivationBudget
from lightning_modules.models.architectures.registry import architecture_of, known_types
from lightning_modules.models.attention.hf_attention import TEXT_ATTENTION, VISION_ATTENTION, register_attention
from lightning_modules.models.attention.packed_rows import PackedRows, one_token_row
from lightning_modules.models.fsdp import ShardedModel, full_tensor, shard_layers
from lightning_modules.models.inference.base import SamplingModel
from lightning_modules.models.inference.plain_model import PlainSamplingModel
from lightning_modules.models.layers.accelerate import accelerate_layers
from lightning_modules.models.layers.lora import (
    LoraSettings,
    adapter_tensors,
    frozen_copy,
    merged_copy,
    with_adapter,
    write_adapter,
)
from lightning_modules.models.merged_folder import check_names, write_merged
from lightning_modules.models.reference import Reference
from lightning_modules.models.token_bans import Ban, end_ids, placeholder_ids, special_ids
from lightning_modules.models.token_log_probs import score_tokens
from lightning_modules.models.vision_feature_cache import FeatureCache, encode_each_once

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class QwenVL(nn.Module):
    """The trained model, its frozen reference, and the common code for prompts and images.

    On the meta device, only `config.json` is read, and no weights are allocated.

    Args:
        path: a folder or a Hub name, of a family in `architectures.registry`.
        lora: train an adapter on the language model; None: train the language model's own weights.
        dtype: data type of the weights, a key of `DTYPES`. The adapter is always float32.
        freeze_vision: the vision tower is not trained.
        with_reference: keep a reference, for `token_log_probs(..., reference=True)`.
        gradient_checkpointing: compute activations again in the backward pass.
        activation_gib: GiB for activations; only as many layers as needed are checkpointed (`ActivationBudget`).

    Raises:
        ValueError: a setting is invalid, or the files of the model cannot be used (`ModelError`).
    """

    def __init__(
        self,
        path: str,
        lora: LoraSettings | None = None,
        dtype: str = "float32",
        freeze_vision: bool = True,
        with_reference: bool = False,
        gradient_checkpointing: bool = False,
        activation_gib: float | None = None,
    ) -> None:
        super().__init__()
        problems = Problems()
        problems.one_of(DTYPES, dtype=dtype)
        problems.extend(lora.problems() if lora is not None else ())
        problems.raise_all("QwenVL")
        on_meta = torch.get_default_device().type == "meta"
        check_model(path, known_types(), need_weights=not on_meta)
        self.processor_path = path
        self.freeze_vision = freeze_vision
        self.with_reference = with_reference
        register_attention()
        model = skeleton(path, DTYPES[dtype]) if on_meta else load_model(path, DTYPES[dtype])
        self.architecture = architecture_of(model)
        self.architecture.check_attention(path, model)
        if not on_meta:
            check_names(path, model.state_dict(), self.architecture)
        model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})
        model = accelerate_layers(model)
        model.requires_grad_(lora is None)
        self.architecture.vision_tower(model).requires_grad_(not freeze_vision)
        # If only an adapter is trained, the reference is the policy without its adapter. Else it is a copy, made before
        # the adapter is added. The copy shares the tensors of a frozen vision tower.
        needs_copy = with_reference and (lora is None or not freeze_vision)
        self.reference_model = frozen_copy(model, share_vision=freeze_vision) if needs_copy else None
        self.model = model if lora is None else with_adapter(model, lora)
        if not freeze_vision:
            self.vision_tower.requires_grad_(True)  # PEFT freezes everything outside the adapter
        if gradient_checkpointing:
            old_name = self.base.gradient_checkpointing_enable  # transformers renamed it after 5.17
            getattr(self.base, "activation_checkpointing_enable", old_name)()
        self.feature_cache: FeatureCache | None = None  # set from outside, to keep a frozen tower's features on disk
        self.sharded: ShardedModel | None = None  # `base`, once its layers are sharded over ranks
        self.reference = Reference()
        has_budget = gradient_checkpointing and activation_gib is not None
        layers = self.architecture.decoder_layers(self.base)
        self.activations = ActivationBudget(layers, activation_gib) if has_budget else None
        if not on_meta:
            self.register_buffer("banned", torch.tensor(self.banned_token_ids), persistent=False)
            self.register_buffer("placeholders", torch.tensor(self.banned_ids("placeholders")), persistent=False)

    @property
    def base(self) -> nn.Module:
        """transformers' module for conditional generation, with LoRA layers in it if there is an adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def vision_tower(self) -> nn.Module:
        return self.architecture.vision_tower(self.base)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.processor_path)

    @property
    def image_token_id(self) -> int:
        return self.base.config.image_token_id

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return end_ids(self.base.generation_config, self.tokenizer)

    @cached_property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that are never sampled in training.

        In every later forward pass, an image placeholder in a completion would count as a placeholder of the prompt.
        """
        return special_ids(self.base.config, self.tokenizer, self.eos_ids)

    def banned_ids(self, ban: Ban) -> tuple[int, ...]:
        return self.banned_token_ids if ban == "special" else placeholder_ids(self.base.config)

    def banned_tokens(self, ban: Ban) -> Tensor:
        """`banned_ids`, long, on the policy's device."""
        return self.banned if ban == "special" else self.placeholders

    def encode_images(self, items: Sequence[EncodedSample], reference: bool = False) -> list[Tensor]:
        """Features of each item's images, in order: [tokens, F] for each item.

        An image that is in several items is encoded once. Only a trained vision tower gets gradients.

        Args:
            items: samples with patches and grids on the policy's device.
            reference: encode with the vision tower of the reference (if it is a copy), without gradient.
        """
        model = self.reference_model if reference and self.reference_model is not None else self.base
        cache = self.feature_cache if self.freeze_vision else None  # the cache is of a frozen tower
        with torch.no_grad() if self.freeze_vision or reference else nullcontext():
            return encode_each_once(items, functools.partial(self.architecture.image_features, model), cache)

    def token_log_probs(
        self,
        rows: PackedRows,
        features: Sequence[Tensor],
        temperature: float = 1.0,
        reference: bool = False,
        ban_tokens: bool = True,
        with_best: bool = False,
        with_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probability of each target of a packed row, under the sampling distribution of rollouts.

        Args:
            rows: one row of `pack_rows`.
            features: the result of `encode_images` for all items of `pack_rows`.
            temperature: divides the logits.
            reference: compute with the reference, without gradient.
            ban_tokens: exclude the tokens that are never sampled in training. If False, the softmax is over the whole
                vocabulary, as in supervised training.
            with_best: also return the most likely token at the position of each target.
            with_entropy: also return the entropy of the distribution at the position of each target, in nats.

        Returns:
            float32 [N], in the order of `rows.targets`; with `with_best` also token ids, long [N], or with
            `with_entropy` float32 [N].

        Raises:
            ValueError: `reference` is set, but the policy has no reference.
        """
        banned, images = self.banned if ban_tokens else None, [features[index] for index in rows.items]
        # Compute in the precision of the weights: beside half-precision weights the adapter is kept in float32.
        half = None if self.base.dtype == torch.float32 else self.base.dtype
        autocast = torch.autocast(self.device.type, dtype=half, enabled=half is not None)
        with self._acting(reference) as model, autocast, self._checkpointing(rows):
            embeddings = self.embed(model, rows.input_ids, images, rows.image_token_index(self.image_token_id))
            hidden = model.hidden_states(rows.attention, rows.position_ids, embeddings)[0]  # [L, D]
            # Compute logits only at positions that predict a target. Prompt tokens need none.
            predicting = hidden[rows.predict]  # [N, D]
            log_probs, best, entropies = score_tokens(
                predicting, rows.targets, model.lm_head, banned, temperature, with_best, with_entropy
            )
        if with_entropy:
            return log_probs, entropies
        return (log_probs, best) if with_best else log_probs

    def dummy_log_prob(self, reference: bool = False) -> Tensor:
        """log p of one token in a row without images. It makes the same passes through the layers as any other row."""
        token = torch.tensor([self.eos_ids[0]], device=self.device)
        return self.token_log_probs(one_token_row(token), [], reference=reference).sum()

    def embed(
        self, model: SamplingModel, input_ids: Tensor, features: Sequence[Tensor], placeholders: Tensor
    ) -> Tensor:
        """Token embeddings [..., D] in which image features replace the placeholders.

        Args:
            model: the model with the embeddings.
            input_ids: long [...].
            features: features of the images in order, each [tokens, F].
            placeholders: indices of the image placeholders in `input_ids`, flattened; long, one for each image token.

        Raises:
            ValueError: there are more or fewer placeholders than features.
        """
        embeddings = model.get_input_embeddings()(input_ids)
        images = torch.cat(list(features)) if features else embeddings.new_zeros(0, embeddings.shape[-1])
        if len(images) != len(placeholders):
            raise ValueError(f"{len(placeholders)} image placeholders but {len(images)} image features")
        if more := images.shape[-1] - embeddings.shape[-1]:  # also for later layers (`Architecture.image_features`)
            embeddings = F.pad(embeddings, (0, more))
        flat = embeddings.flatten(0, -2).index_copy(0, placeholders, images.to(embeddings.dtype))
        return flat.view_as(embeddings)

    @contextmanager
    def _acting(self, reference: bool) -> Iterator[SamplingModel]:
        """The model that answers: the policy, or the reference without gradient."""
        if not reference:
            yield PlainSamplingModel(self.base)
            return
        if not self.with_reference:
            raise ValueError("reference=True, but the policy was built with_reference=False")
        with self.reference.acting(self) as model:
            yield model

    def _checkpointing(self, rows: PackedRows) -> AbstractContextManager:
        """Checkpoint as few layers as this row allows. Without a budget, or if memory cannot be measured, gradient
        checkpointing is not changed (all layers or none)."""
        budget, with_gradient = self.activations, self.training and torch.is_grad_enabled()
        if budget is None or not with_gradient or self.device.type != "cuda":
            return nullcontext()
        return budget.row(rows.input_ids.shape[1])

    def decoder(self) -> nn.Module:
        """The model for sampling, in evaluation mode, with LoRA merged. It shares the other tensors.

        Raises:
            RuntimeError: the policy is sharded over ranks, and this is outside `gathered`.
        """
        return self.sharded.decoder() if self.sharded else merged_copy(self.base).eval()

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the decoder layers of policy and reference over the ranks of `mesh` (`fsdp`)."""
        self.sharded = ShardedModel(self.base, self.architecture, mesh)
        if self.reference_model is not None:
            shard_layers(self.reference_model, self.architecture, mesh)

    def gathered(self) -> AbstractContextManager:
        """Inside this context, the policy can decode. Its weights must not change inside.

        If the policy is sharded, all ranks must enter together: gathering is a collective operation.
        """
        return nullcontext() if self.sharded is None else self.sharded.gathered()

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in `model`, full value) of each trained parameter; ranks of a sharded policy iterate together."""
        return ((name, full_tensor(p.detach())) for name, p in self.model.named_parameters() if p.requires_grad)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save_adapter(self, folder: str | Path, write: bool = True) -> None:
        """Write the adapter in PEFT's format, if there is one. All ranks must call it, one of them with `write`."""
        if isinstance(self.model, PeftModel):
            tensors = adapter_tensors(self.model)
            if write:
                write_adapter(tensors, self.model, Path(folder))

    def save_merged(self, folder: str | Path, write: bool = True, texts: Mapping[str, str] | None = None) -> None:
        """Write a copy of the model's folder with the adapter merged into the weights (`write_merged`).

        All ranks must call it together, exactly one of them with `write`. `folder` appears complete or not at all; an
        older folder is replaced. `texts` are further files, {name: content}.
        """
        merged = self.sharded.copy(device="cpu" if write else "meta") if self.sharded is not None else None
        if not write:
            return
        state = (merged or merged_copy(self.base)).state_dict()
        write_merged(state, self.processor_path, folder, self.architecture, texts)
