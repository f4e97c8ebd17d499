"""The policy: a Qwen2.5-VL with its tokenizer, adapter and reference.

This is the only file that knows the modules inside a Qwen2.5-VL; `datamodules/checkpoints/pretrained.py` loads it.

Shapes: P prompts, N target tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from datamodules.checkpoints.model_folder import check_model
from datamodules.checkpoints.pretrained import load_model, load_tokenizer, skeleton
from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.activation_checkpointing import ActivationBudget
from lightning_modules.models.attention.hf_attention import TEXT_ATTENTION, VISION_ATTENTION, register_attention
from lightning_modules.models.attention.packed_rows import PackedRows, one_token_row
from lightning_modules.models.fsdp import ShardedModel, shard_layers, whole
from lightning_modules.models.inference.cpu_model import KeptLean, LeanModel
from lightning_modules.models.layers.cpu_allocator import keep_freed_memory
from lightning_modules.models.layers.fused_layers import with_fused_layers
from lightning_modules.models.layers.lora import LoraSettings, fold_again, folded_copy, frozen_copy, with_adapter
from lightning_modules.models.layers.onednn_linear import with_fast_linears
from lightning_modules.models.merged_folder import check_names, write_merged
from lightning_modules.models.token_bans import Ban, end_ids, placeholder_ids, special_ids
from lightning_modules.models.token_log_probs import score_tokens
from lightning_modules.models.vision_feature_cache import FeatureCache, chunk_images

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_settings(lora: LoraSettings | None, dtype: str) -> None:
    """All contradictions at once, before any weight is read."""
    faults = []
    if dtype not in DTYPES:
        faults.append(f"dtype={dtype!r} is none of {sorted(DTYPES)}")
    faults += lora.faults() if lora is not None else []
    if faults:
        raise ValueError("; ".join(faults))


class QwenVL(nn.Module):
    """`path` is a folder or a Hub name. On the meta device only `config.json` is read and no weight is allocated."""

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
        check_settings(lora, dtype)
        on_meta = torch.get_default_device().type == "meta"
        check_model(path, need_weights=not on_meta)
        self.processor_path = path
        self.freeze_vision = freeze_vision
        self.with_reference = with_reference
        model = _load(path, DTYPES[dtype], on_meta)
        model.requires_grad_(lora is None)
        model.model.visual.requires_grad_(not freeze_vision)
        # Where only an adapter is trained, the reference is the policy without it. Else it is a copy, taken before the
        # adapter goes in: frozen vision weights are shared, the rest is truly copied.
        needs_copy = with_reference and (lora is None or not freeze_vision)
        self.reference_model = frozen_copy(model, share_vision=freeze_vision) if needs_copy else None
        self.model = model if lora is None else with_adapter(model, lora)
        if not freeze_vision:
            self.base.model.visual.requires_grad_(True)  # PEFT freezes all but its own
        if gradient_checkpointing:
            old_name = self.base.gradient_checkpointing_enable  # transformers renamed it after 5.17
            getattr(self.base, "activation_checkpointing_enable", old_name)()
        self.feature_cache: FeatureCache | None = None  # set by who wants a frozen tower's features kept on disk
        self.sharded: ShardedModel | None = None  # `base`, once its layers are divided over ranks
        self._lean_reference = KeptLean()
        self.activations: ActivationBudget | None = None
        if gradient_checkpointing and activation_gib is not None:
            self.activations = ActivationBudget(self.base.model.language_model.layers, activation_gib)
        if not on_meta:
            self.register_buffer("banned", torch.tensor(self.banned_token_ids), persistent=False)
            self.register_buffer("placeholders", torch.tensor(self.banned_ids("placeholders")), persistent=False)

    @property
    def base(self) -> nn.Module:
        """The Qwen2_5_VLForConditionalGeneration, with LoRA layers in it if there is an adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

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
        """Never sampled in training.

        A policy that writes an image placeholder changes the meaning of its own prompt and breaks every later forward.
        """
        return special_ids(self.base.config, self.tokenizer, self.eos_ids)

    def banned_ids(self, ban: Ban) -> tuple[int, ...]:
        return self.banned_token_ids if ban == "special" else placeholder_ids(self.base.config)

    def banned_tokens(self, ban: Ban) -> Tensor:
        """The same, on the policy's device."""
        return self.banned if ban == "special" else self.placeholders

    def encode_images(self, items: Sequence[EncodedSample], reference: bool = False) -> list[Tensor]:
        """Image features [tokens, D] of each item, its images in order. The same image in several items runs once."""
        model = self.reference_model if reference and self.reference_model is not None else self.base
        unique: dict[str, tuple[Tensor, Tensor]] = {}
        for item in items:
            pixels = item.pixel_values.split(item.grid_thw.prod(-1).tolist())
            for key, patches, grid in zip(item.image_keys, pixels, item.grid_thw, strict=True):
                unique.setdefault(key, (patches, grid))
        cache = self.feature_cache if self.freeze_vision else None
        features: dict[str, Tensor] = {}
        for key, (_, grid) in unique.items() if cache is not None else ():
            if (known := cache.get(key, grid.tolist(), self.device)) is not None:
                features[key] = known
        missing = {key: image for key, image in unique.items() if key not in features}
        with torch.no_grad() if self.freeze_vision or reference else nullcontext():
            for keys in chunk_images(missing):
                patches = torch.cat([unique[key][0] for key in keys])
                grids = torch.stack([unique[key][1] for key in keys])
                features.update(zip(keys, model.model.get_image_features(patches, grids).pooler_output, strict=True))
        for key, (_, grid) in missing.items() if cache is not None else ():
            cache.put(key, grid.tolist(), features[key])
        return [torch.cat([features[key] for key in item.image_keys]) for item in items]

    def token_log_probs(
        self,
        rows: PackedRows,
        features: Sequence[Tensor],
        temperature: float = 1.0,
        reference: bool = False,
        ban_tokens: bool = True,
        with_best: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """log p of each target [N], in the order of `rows.targets`, under the distribution that rollouts sample from.

        `features` are those of all items given to `pack_rows` (`encode_images`). `ban_tokens=False` normalises over the
        whole vocabulary, as supervised training does. With `reference=True` the reference answers, without gradient.
        `with_best` also gives the likeliest token [N] in the place of each target.
        """
        banned = self.banned if ban_tokens else None
        with self._acting(reference) as model, self._autocast(), self._checkpointing(rows):
            hidden = self._hidden_states(model, rows, features)[rows.predict]
            log_probs, best = score_tokens(hidden, rows.targets, model.lm_head, banned, temperature, with_best)
        return (log_probs, best) if with_best else log_probs

    def _hidden_states(self, model: nn.Module | LeanModel, rows: PackedRows, features: Sequence[Tensor]) -> Tensor:
        """[L, D], after the last norm."""
        images, slots = [features[index] for index in rows.items], rows.image_slots(self.image_token_id)
        embeddings = self.embed(model, rows.input_ids, images, slots)
        if isinstance(model, LeanModel):
            return model.hidden_states(rows.attention, rows.position_ids, inputs_embeds=embeddings)[0]
        outputs = model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=rows.position_ids,
            # What stands in a mapping is handed on as it is: transformers builds no mask of its own.
            attention_mask={"full_attention": rows.attention},
            use_cache=False,
        )
        return outputs.last_hidden_state.flatten(0, 1)

    def dummy_log_prob(self, reference: bool = False) -> Tensor:
        """log p of one token in a row without images: the passes through the layers that any row makes."""
        token = torch.tensor([self.eos_ids[0]], device=self.device)
        return self.token_log_probs(one_token_row(token), [], reference=reference).sum()

    def embed(self, model: nn.Module, input_ids: Tensor, features: Sequence[Tensor], slots: Tensor) -> Tensor:
        """Token embeddings [..., D] with image features at the flat indices `slots`."""
        embeddings = model.get_input_embeddings()(input_ids)
        images = torch.cat(list(features)) if features else embeddings.new_zeros(0, embeddings.shape[-1])
        if len(images) != len(slots):
            raise ValueError(f"{len(slots)} image placeholders but {len(images)} image features")
        flat = embeddings.flatten(0, -2).index_copy(0, slots, images.to(embeddings.dtype))
        return flat.view_as(embeddings)

    @contextmanager
    def _acting(self, reference: bool) -> Iterator[nn.Module | LeanModel]:
        """The model that answers: the policy, or the reference without gradient."""
        if not reference:
            yield self.base
            return
        if not self.with_reference:
            raise ValueError("reference=True asked of a policy built with_reference=False")
        model = self.base if self.reference_model is None else self.reference_model
        lean = self.sharded is None and LeanModel.can_read(model)
        without_adapter = nullcontext() if lean or model is not self.base else self.model.disable_adapter()
        with torch.no_grad(), without_adapter:
            yield self._lean_reference.read(model) if lean else model

    def _checkpointing(self, rows: PackedRows) -> AbstractContextManager:
        """Checkpoint as many layers as this row needs; without a budget, or off the GPU, all or none, as was set."""
        if self.activations is None or self.device.type != "cuda" or not (self.training and torch.is_grad_enabled()):
            return nullcontext()
        return self.activations.row(rows.input_ids.shape[1])

    def _autocast(self) -> torch.autocast:
        """Adapters are kept in float32 beside half-precision weights; their products run in the weights' precision."""
        half = None if self.base.dtype == torch.float32 else self.base.dtype
        return torch.autocast(self.device.type, dtype=half, enabled=half is not None)

    def decoder(self, fold_adapter: bool = True) -> nn.Module:
        """The model for decoding: shares the policy's tensors, in evaluation mode, by default with LoRA folded in.

        Of a policy that is divided over ranks it can be had inside `gathered` only.
        """
        return self.sharded.decoder(fold_adapter) if self.sharded else folded_copy(self.base, fold_adapter).eval()

    def shard(self, mesh: DeviceMesh) -> None:
        """Divide the decoder layers, of policy and reference, over the ranks of `mesh` (`sharding`)."""
        self.sharded = ShardedModel(self.base, self.base.model.language_model, mesh)
        if self.reference_model is not None:
            shard_layers(self.reference_model.model.language_model, mesh)

    def gathered(self, fold_adapter: bool = True) -> AbstractContextManager:
        """Inside, the policy can decode; its weights may not change. All ranks enter a divided one together."""
        return nullcontext() if self.sharded is None else self.sharded.gathered(fold_adapter)

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name in `model` and whole value of all that is trained; ranks go through a divided policy together."""
        return ((name, whole(p.detach())) for name, p in self.model.named_parameters() if p.requires_grad)

    def refresh_decoder(self, model: nn.Module) -> None:
        """Bring a `decoder` up to date with an adapter that has been trained since; its tensors stay where they are."""
        fold_again(model, self.base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save_merged(self, folder: str | Path, write: bool = True) -> None:
        """Write the model's folder again with the adapter merged into its weights (`write_merged`), whole or not at
        all, in place of an older folder. All ranks call it, and exactly one rank with `write`."""
        merged = self.sharded.copy(place="cpu" if write else "meta") if self.sharded is not None else None
        if not write:
            return
        write_merged((merged or folded_copy(self.base)).state_dict(), self.processor_path, folder)


def _load(path: str, dtype: torch.dtype, on_meta: bool) -> nn.Module:
    register_attention()
    keep_freed_memory()
    model = skeleton(path, dtype) if on_meta else load_model(path, dtype)
    if not on_meta:
        check_names(path, model.state_dict())
    model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})
    return with_fast_linears(with_fused_layers(model))
