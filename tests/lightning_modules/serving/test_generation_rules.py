"""One decoding for every predictor: the same weights give the same answers, whatever a checkpoint's settings or a
server's defaults say; and only placeholders are banned in it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from datamodules.encoding.chat_request import RequestForm
from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.encoding.model_families import find_model_family
from datamodules.samples.sample import BoxAnswer, ImagePart, LoadedSample, Sample, TextPart
from lightning_modules.models.qwen_vl import QwenVL
from lightning_modules.predictors.base import Decoding
from lightning_modules.predictors.huggingface import HuggingFacePredictor
from lightning_modules.predictors.openai_endpoint import OpenAIPredictor
from lightning_modules.predictors.policy import PolicyPredictor
from lightning_modules.rollouts.base import RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.engine import NativeEngine
from lightning_modules.serving.generation_rules import NEUTRAL, configure
from lightning_modules.serving.openai_client import EndpointMisused, EndpointSettings
from lightning_modules.serving.transformers_server import sampling_folder
from tests.chat_server import ChatServer, http_response
from tests.conftest import QUESTIONS, SIZES, random_png

LENGTH = 16
PUBLISHED = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
# Each changes what the tiny model writes.
CHANGES = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(0, 330, 2)),
    "begin_suppress_tokens": list(range(0, 330, 2)),
    "bad_words_ids": [[token] for token in range(0, 330, 2)],
    "sequence_bias": [[[token], -20.0] for token in range(0, 330, 2)],
    "forced_eos_token_id": 5,
    "num_beams": 4,
}
SAMPLES = [
    Sample(
        f"q/{number}",
        "test",
        "refer",
        tuple(f"{number}_{k}.png" for k in range(1 + number % 3)),
        (*(ImagePart(k) for k in range(1 + number % 3)), TextPart(QUESTIONS[number % len(QUESTIONS)])),
        BoxAnswer(0, (0.1, 0.2, 0.6, 0.9), "ring"),
    )
    for number in range(8)
]


def load(sample: Sample) -> LoadedSample:
    rng = random.Random(sample.id)
    return LoadedSample(sample, tuple(random_png(rng, rng.choice(SIZES)) for _ in sample.images))


def copied(model: Path, folder: Path, **settings) -> Path:
    """The model with other generation settings beside its token ids."""
    shutil.copytree(model, folder)
    file = folder / "generation_config.json"
    ids = {name: value for name, value in json.loads(file.read_text()).items() if name.endswith("token_id")}
    file.write_text(json.dumps(ids | settings))
    return folder


def texts(predictor) -> list[tuple[str, int]]:
    found = {sample.id: (reply.text, reply.num_tokens) for sample, reply in predictor.answers(SAMPLES, load)}
    return [found[sample.id] for sample in SAMPLES]


def image_text(model: Path, generation: str = "greedy") -> HuggingFacePredictor:
    form = RequestForm(find_model_family("qwen2_5_vl"), "plain", max_pixels=28_900)
    return HuggingFacePredictor(str(model), form, Decoding(LENGTH, generation=generation))


def native(model: Path, generation: str = "greedy") -> PolicyPredictor:
    encoder = Encoder(str(model), "absolute_pixels", "plain", 4096, LENGTH, with_target=False)
    policy = QwenVL(str(model)).eval()
    return PolicyPredictor(policy, NativeEngine(policy), encoder, Decoding(LENGTH, 4, generation))


def test_two_predictors_give_the_same_answers_of_the_same_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With the kind of settings that Qwen2.5-VL is published with: 0 of 8 were equal."""
    published = copied(tiny_model_dir, tmp_path / "m", **PUBLISHED)
    ours = texts(native(published))
    assert texts(image_text(published)) == ours == texts(native(tiny_model_dir))
    assert len(set(ours)) > 4


@pytest.mark.parametrize("name", CHANGES)
def test_no_setting_of_a_checkpoint_changes_a_greedy_answer(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = texts(image_text(tiny_model_dir))
    changed = copied(tiny_model_dir, tmp_path / "m", **{name: CHANGES[name]})
    assert texts(image_text(changed)) == plain
    assert texts(image_text(changed, "model")) != plain, "under `model` it would have"


def test_every_field_that_transformers_fills_from_a_model_is_stated_or_empty() -> None:
    """A new field of a later version must not bring a model's own value back."""
    hostile = GenerationConfig(**(PUBLISHED | CHANGES), eos_token_id=[7], pad_token_id=3, bos_token_id=2)
    made = configure(hostile, "greedy", 9, {7, 8}, {11})
    stated = NEUTRAL | {"max_new_tokens": 9, "eos_token_id": [7, 8], "pad_token_id": 3, "bos_token_id": 2}
    stated["suppress_tokens"] = [11]
    found = {name: value for name, value in made.to_dict().items() if value is not None}
    assert {name: value for name, value in found.items() if name != "transformers_version"} == stated


def test_the_models_own_settings_are_used_where_they_are_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same by both predictors in this process; what is sampled is sampled again."""
    strong = copied(tiny_model_dir, tmp_path / "m", repetition_penalty=1.8)
    own = texts(native(strong, "model"))
    assert own == texts(image_text(strong, "model")) != texts(native(strong))
    sampling = copied(tiny_model_dir, tmp_path / "s", do_sample=True, temperature=3.0)
    assert texts(native(sampling, "model")) == texts(native(sampling, "model")) != texts(native(sampling))


def test_the_way_of_decoding_is_a_part_of_the_identity(tiny_model_dir: Path) -> None:
    made = [native(tiny_model_dir), native(tiny_model_dir, "model")]
    made += [image_text(tiny_model_dir), image_text(tiny_model_dir, "model")]
    made += [endpoint("http://a/v1"), endpoint("http://a/v1", "model")]
    made += [endpoint("http://a/v1", sampling_fields="openai")]
    identities = [json.dumps(one.identity(), sort_keys=True) for one in made]
    assert len(set(identities)) == len(made)
    for index in (0, 2, 4):
        assert made[index].identity()["decoding"]["repetition_penalty"] == 1.0


# Special tokens


@pytest.fixture
def box_writer(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model that likes <|box_start|> best of all wherever it does not like a placeholder better."""
    folder = tmp_path / "box_writer"
    policy = QwenVL(str(tiny_model_dir))
    with torch.no_grad():
        head = policy.base.get_input_embeddings().weight
        start, image = policy.tokenizer.convert_tokens_to_ids(["<|box_start|>", "<|image_pad|>"])
        rng = torch.Generator().manual_seed(0)
        head[start] = 3 * head[torch.randint(len(head), (1,), generator=rng)]
        head[image] = 4 * head[torch.randint(len(head), (1,), generator=rng)]
    policy.save_merged(folder)
    return folder


@pytest.mark.parametrize("static", [False, True])
def test_a_greedy_answer_may_hold_any_special_token_but_a_placeholder(
    box_writer: Path, make_items: Callable[..., list[EncodedSample]], static: bool
) -> None:
    policy, items = QwenVL(str(box_writer)).eval(), make_items([1, 2, 3, 1] * 4)
    placeholders = policy.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    rollouts = NativeEngine(policy, static=static).generate(RolloutRequest.for_evaluation(items, 12, 4))
    written, wanted = set(), []
    for item, (rollout,) in zip(items, rollouts, strict=True):
        ids = item.input_ids[None]
        settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": list(policy.eos_ids)}
        pixels = {"pixel_values": item.pixel_values, "image_grid_thw": item.grid_thw}
        full = policy.base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == policy.image_token_id).int(),
            suppress_tokens=placeholders,
            **pixels,
            **settings,
        )
        wanted.append(full[0, ids.shape[1] :].tolist())
        assert rollout.token_ids.tolist() == wanted[-1]
        written |= set(wanted[-1])
    assert policy.tokenizer.convert_tokens_to_ids("<|box_start|>") in written and not written & set(placeholders)


def test_every_predictor_in_this_process_bans_placeholders_alone(box_writer: Path) -> None:
    assert texts(native(box_writer)) == texts(image_text(box_writer))


def test_training_still_samples_no_special_token(
    box_writer: Path, make_items: Callable[..., list[EncodedSample]]
) -> None:
    policy = QwenVL(str(box_writer)).eval()
    groups = NativeEngine(policy).generate(
        RolloutRequest(make_items([1, 2]), SamplingSettings(8, 1.0, 12), seeds=[1, 2])
    )
    written = {token for group in groups for rollout in group for token in rollout.token_ids.tolist()}
    assert not written & set(policy.banned_token_ids)
    assert policy.tokenizer.convert_tokens_to_ids("<|box_start|>") in policy.banned_token_ids


# Servers


def endpoint(base_url: str, generation: str = "greedy", **more) -> OpenAIPredictor:
    settings = EndpointSettings("InternVL", base_url, **more)
    form = RequestForm(find_model_family("internvl"))
    return OpenAIPredictor(settings, form, Decoding(LENGTH, generation=generation))


def test_a_server_is_told_every_rule_and_under_model_none() -> None:
    rules = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
    with ChatServer(lambda request: "[0, 0, 1, 1]") as server:
        list(endpoint(server.base_url).answers(SAMPLES[:1], load))
        greedy = server.requests[-1]
        list(endpoint(server.base_url, "model").answers(SAMPLES[:1], load))
        own = server.requests[-1]
    assert {name: greedy[name] for name in rules} == {
        "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0,
    }  # fmt: skip
    assert not rules & own.keys()


def strict(request: dict) -> str | bytes:
    """As OpenAI's own server does."""
    for field in ("top_k", "min_p", "repetition_penalty"):
        if field in request:
            return http_response(400, f'{{"error": {{"message": "Unrecognized argument: {field}"}}}}'.encode())
    return "[0, 0, 1, 1]"


def test_a_server_that_refuses_a_rule_is_named_with_the_setting_and_nothing_is_left_out_silently() -> None:
    with ChatServer(strict) as server:
        with pytest.raises(EndpointMisused, match=r"min_p, repetition_penalty, top_k.*sampling_fields=openai"):
            list(endpoint(server.base_url).answers(SAMPLES[:1], load))
        found = list(endpoint(server.base_url, sampling_fields="openai").answers(SAMPLES[:1], load))
    assert [reply.text for _, reply in found] == ["[0, 0, 1, 1]"]


def test_further_fields_must_not_contradict_the_rules() -> None:
    with pytest.raises(ValueError, match=r"extra_body: repetition_penalty=1\.05 .*generation=model"):
        endpoint("http://a/v1", extra_body={"repetition_penalty": 1.05})
    endpoint("http://a/v1", "model", extra_body={"repetition_penalty": 1.05})
    endpoint("http://a/v1", extra_body={"chat_template_kwargs": {}})


def test_a_local_teacher_samples_by_temperature_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    published = copied(tiny_model_dir, tmp_path / "m", **PUBLISHED, suppress_tokens=[5])
    found = json.loads((sampling_folder(published, tmp_path / "served") / "generation_config.json").read_text())
    assert found["do_sample"] and (found["repetition_penalty"], found["top_k"], found["top_p"]) == (1.0, 0, 1.0)
    assert "eos_token_id" in found and "suppress_tokens" not in found and "temperature" not in found
