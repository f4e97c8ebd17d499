from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.encoding.encoder import EncodedSample
from lightning_modules.models.attention.packed_rows import pack_rows
from lightning_modules.models.attention.ragged_kv_cache import RaggedKVCache
from lightning_modules.models.qwen_vl import LoraSettings, QwenVL
from lightning_modules.rollouts.base import Rollout, RolloutRequest, SamplingSettings
from lightning_modules.rollouts.native.decoder import CompletionDecoder
from lightning_modules.rollouts.native.engine import NativeEngine

MakeItems = Callable[..., list[EncodedSample]]


@pytest.fixture
def policy(tiny_model_dir: Path) -> QwenVL:
    torch.manual_seed(0)
    policy = QwenVL(str(tiny_model_dir), lora=LoraSettings(rank=4, alpha=8)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return policy


def generate(
    policy: QwenVL, items: list[EncodedSample], engine: NativeEngine | None = None, greedy=False, **settings: object
) -> list[list[Rollout]]:
    chosen = {"group_size": 4, "temperature": 1.0, "max_new_tokens": 12, "prompts_per_batch": 3} | settings
    generator = torch.Generator(policy.device).manual_seed(3)
    engine = engine or NativeEngine(policy)
    return engine.generate(RolloutRequest(items, SamplingSettings(**chosen), generator=generator, greedy=greedy))


def end_often(policy: QwenVL) -> None:
    """Make every twelfth token an end, so that completions end at many different lengths."""
    policy.__dict__["eos_ids"] = (*policy.eos_ids, *range(0, 250, 12))


@pytest.mark.parametrize("static", [False, True])
def test_greedy_equals_transformers_generate(policy: QwenVL, make_items: MakeItems, static: bool) -> None:
    items = make_items([1, 2, 3, 4, 2])
    engine = NativeEngine(policy, static=static)
    rollouts = generate(policy, items, engine, group_size=1, greedy=True, max_new_tokens=24)
    policy.eval()
    for item, (rollout,) in zip(items, rollouts, strict=True):
        ids = item.input_ids[None]
        full = policy.base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=item.pixel_values,
            image_grid_thw=item.grid_thw,
            mm_token_type_ids=(ids == policy.image_token_id).int(),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=list(policy.banned_token_ids),
            eos_token_id=list(policy.eos_ids),
            pad_token_id=0,
        )
        assert rollout.token_ids.tolist() == full[0, ids.shape[1] :].tolist()
    assert len({str(rollout.token_ids.tolist()) for (rollout,) in rollouts}) > 2


@pytest.mark.parametrize("static", [False, True])
def test_log_probs_equal_those_of_training(policy: QwenVL, make_items: MakeItems, static: bool) -> None:
    end_often(policy)
    items = make_items([1, 3, 2, 6, 1, 2, 4])
    # Three places for seven prompts: they are filled again in the middle of others' completions.
    rollouts = generate(policy, items, NativeEngine(policy, static), temperature=0.7, max_new_tokens=40)
    lengths = [len(r.token_ids) for group in rollouts for r in group]
    assert len(set(lengths)) > 5 and min(lengths) < 20  # ragged: rows were dropped on the way
    assert_log_probs_are_trainings(policy, items, rollouts, 0.7)


def assert_log_probs_are_trainings(
    policy: QwenVL, items: list[EncodedSample], rollouts: list[list[Rollout]], temperature: float
) -> None:
    rows = pack_rows(items, [[r.token_ids for r in group] for group in rollouts], 2000)
    features = policy.encode_images(items)
    with torch.no_grad():
        expected = torch.cat([policy.token_log_probs(row, features, temperature) for row in rows])
    actual = torch.cat([r.log_probs for group in rollouts for r in group])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_completions_end_with_their_end_token_or_at_the_limit(policy: QwenVL, make_items: MakeItems) -> None:
    end_often(policy)
    rollouts = [r for group in generate(policy, make_items([1, 2, 1]), max_new_tokens=10) for r in group]
    ends = set(policy.eos_ids)
    for rollout in rollouts:
        ids = rollout.token_ids.tolist()
        assert not ends & set(ids[:-1])
        assert rollout.finished == (ids[-1] in ends)
        assert rollout.finished or len(ids) == 10
        assert len(ids) == len(rollout.log_probs)
        assert not set(ids) & set(policy.banned_token_ids)
        assert rollout.text == policy.tokenizer.decode(ids, skip_special_tokens=True)
    assert len({rollout.finished for rollout in rollouts}) == 2


def test_results_do_not_depend_on_batching_and_features(policy: QwenVL, make_items: MakeItems) -> None:
    items = make_items([2, 1, 4, 1])
    options = {"group_size": 1, "max_new_tokens": 8}
    alone = generate(policy, items, prompts_per_batch=1, greedy=True, **options)
    sampling = SamplingSettings(temperature=1.0, prompts_per_batch=3, **options)
    features = policy.encode_images(items)
    request = RolloutRequest(items, sampling, features, greedy=True)
    together = NativeEngine(policy).generate(request)
    for (a,), (b,) in zip(alone, together, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_ragged_completions_are_those_of_each_prompt_alone(policy: QwenVL, make_items: MakeItems, static: bool) -> None:
    end_often(policy)
    items, settings = make_items([1, 3, 2, 1, 2, 1, 2, 4, 1]), SamplingSettings(4, 1.0, 40, prompts_per_batch=3)
    seeds = list(range(20, 20 + len(items)))
    together = NativeEngine(policy, static).generate(RolloutRequest(items, settings, seeds=seeds))
    for item, seed, group in zip(items, seeds, together, strict=True):
        (alone,) = NativeEngine(policy).generate(RolloutRequest([item], settings, seeds=[seed]))
        for one, other in zip(group, alone, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
    assert len({len(r.token_ids) for group in together for r in group}) > 10


def test_completions_that_end_make_room_for_further_prompts(
    policy: QwenVL, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_often(policy)
    active: list[tuple[int, int]] = []  # prompts and rows of each step
    begin = RaggedKVCache.begin

    def watched(cache: RaggedKVCache) -> None:
        active.append((len(cache.prefix_lengths), len(cache.num_seen)))
        begin(cache)

    monkeypatch.setattr(RaggedKVCache, "begin", watched)
    rollouts = generate(policy, make_items([1] * 12), prompts_per_batch=4, max_new_tokens=40)
    assert max(prompts for prompts, _ in active) > 4
    assert max(rows for _, rows in active) <= 16
    # A step computes only rows that have not ended; the first token of a completion needs no step.
    lengths = [len(r.token_ids) for group in rollouts for r in group]
    assert sum(rows for _, rows in active) == sum(lengths) - len(lengths)


@pytest.mark.parametrize("static", [False, True])
def test_a_decoder_can_be_used_again_after_an_error(
    policy: QwenVL, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    end_often(policy)
    engine, items, decoders = NativeEngine(policy, static), make_items([1, 2]), []
    with monkeypatch.context() as patch:
        patch.setattr(CompletionDecoder, "_advance", lambda self, _: decoders.append(self) or 1 / 0)
        with pytest.raises(ZeroDivisionError):  # in the first step, with all memory in use
            generate(policy, items, engine)
    expected = generate(policy, items)
    monkeypatch.setattr(engine, "_decoder", lambda *_: decoders[0])
    for one, other in zip(generate(policy, items, engine), expected, strict=True):
        assert [r.token_ids.tolist() for r in one] == [r.token_ids.tolist() for r in other]


def test_a_seed_gives_the_same_rollouts_and_completions_differ(policy: QwenVL, make_items: MakeItems) -> None:
    items = make_items([1, 2])
    first, second = (generate(policy, items) for _ in range(2))
    assert [[r.token_ids.tolist() for r in g] for g in first] == [[r.token_ids.tolist() for r in g] for g in second]
    assert all(len({str(r.token_ids.tolist()) for r in group}) == 4 for group in first)


def test_rollouts_leave_the_policy_as_it_was(policy: QwenVL, make_items: MakeItems) -> None:
    before = {name: p.clone() for name, p in policy.named_parameters()}
    items = make_items([1])
    features = policy.encode_images(items)
    log_probs = generate(policy, items)[0][0].log_probs
    assert policy.training and all(m.training for m in policy.base.model.language_model.modules())
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert not (log_probs.is_inference() or features[0].is_inference())  # training may use both


@pytest.mark.parametrize("static", [False, True])
def test_rollouts_can_be_trained_on(policy: QwenVL, make_items: MakeItems, static: bool) -> None:
    ((rollout, *_),) = generate(policy, make_items([2]), NativeEngine(policy, static=static))
    weight = torch.ones(len(rollout.token_ids), requires_grad=True)
    (weight * rollout.log_probs).sum().backward()  # keeps them for the gradient, which inference mode forbids
    assert torch.equal(weight.grad, rollout.log_probs)
    assert not rollout.token_ids.is_inference() and not torch.is_inference_mode_enabled()


def test_first_tokens_of_a_group_follow_the_model(policy: QwenVL, make_items: MakeItems) -> None:
    """The whole engine: 4,000 completions of a prompt against its next-token distribution, rare tokens pooled."""
    items = make_items([2])
    draws = 4000
    rollouts = generate(policy, items, group_size=draws, max_new_tokens=1)[0]
    counts = torch.bincount(torch.cat([r.token_ids for r in rollouts]), minlength=policy.tokenizer.vocab_size).double()
    vocabulary = torch.arange(len(counts))
    (row,) = pack_rows(items, [[vocabulary[i : i + 1] for i in vocabulary]], 10_000)
    with torch.no_grad():
        expected = policy.token_log_probs(row, policy.encode_images(items)).double().exp()
    common = draws * expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    hoped = draws * torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((observed - hoped) ** 2 / hoped).sum()
    freedom = len(hoped) - 1
    assert freedom > 5
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations above the mean


@pytest.mark.parametrize("static", [False, True])
def test_later_tokens_follow_the_model_too(policy: QwenVL, make_items: MakeItems, static: bool) -> None:
    """The second token after the commonest first one, which a step over the cache has sampled."""
    items = make_items([2])
    options = {"group_size": 4000, "max_new_tokens": 2, "temperature": 0.4}
    rollouts = [r.token_ids for r in generate(policy, items, NativeEngine(policy, static=static), **options)[0]]
    first = torch.mode(torch.stack([ids[0] for ids in rollouts])).values
    seconds = torch.cat([ids[1:] for ids in rollouts if ids[0] == first])
    counts = torch.bincount(seconds, minlength=policy.tokenizer.vocab_size).double()
    pairs = [torch.stack([first, token]) for token in torch.arange(len(counts))]
    (row,) = pack_rows(items, [pairs], 10_000)
    with torch.no_grad():
        expected = policy.token_log_probs(row, policy.encode_images(items), 0.4)[1::2].double().exp()
    common = len(seconds) * expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    hoped = len(seconds) * torch.cat([expected[common], expected[~common].sum()[None]])
    freedom = len(hoped) - 1
    assert freedom >= 3 and len(seconds) > 500
    assert ((observed - hoped) ** 2 / hoped).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_one_long_completion_does_not_hold_the_others(
    policy: QwenVL, make_items: MakeItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_often(policy)
    items, steps = make_items([1, 2, 1, 3, 1, 2, 2, 1]), []
    advance = CompletionDecoder._advance
    monkeypatch.setattr(CompletionDecoder, "_advance", lambda *args: steps.append(1) or advance(*args))
    rollouts = generate(policy, items, group_size=1, prompts_per_batch=2, max_new_tokens=40)
    order = sorted(range(len(items)), key=lambda i: len(items[i].input_ids))
    lengths = [len(rollouts[i][0].token_ids) for i in order]
    batches = [max(lengths[k : k + 2]) - 1 for k in range(0, len(lengths), 2)]  # the first token needs no step
    assert max(lengths) > 3 * min(lengths)
    assert len(steps) < sum(batches)


def test_kept_memory_is_used_again_with_the_weights_of_the_day(policy: QwenVL, make_items: MakeItems) -> None:
    end_often(policy)
    engine, items = NativeEngine(policy, static=True), make_items([2, 1, 3])
    first = generate(policy, items, engine, max_new_tokens=20)
    decoder = engine._kept[1]
    addresses = [layer.keys.data_ptr() for layer in decoder.cache.layers]
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    second = generate(policy, items, engine, max_new_tokens=12)  # less room than there is
    assert engine._kept[1] is decoder
    assert [layer.keys.data_ptr() for layer in decoder.cache.layers] == addresses
    assert max(len(r.token_ids) for group in second for r in group) == 12
    assert_log_probs_are_trainings(policy, items, second, 1.0)
    assert first[0][0].token_ids.tolist() != second[0][0].token_ids.tolist()
    generate(policy, items, engine, max_new_tokens=30)
    assert engine._kept[1] is not decoder  # more room than there was


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_what_a_cpu_gives(policy: QwenVL, make_items: MakeItems) -> None:
    items = make_items([1, 2, 3, 4, 2])
    options = {"group_size": 1, "greedy": True, "max_new_tokens": 100}  # two widths, so two graphs
    expected = generate(policy, items, **options)
    engine = NativeEngine(policy.cuda())
    on_gpu = [item.to("cuda") for item in items]
    for _ in range(2):  # captured, then replayed
        actual = generate(policy, on_gpu, engine, **options)
        for (one,), (other,) in zip(actual, expected, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "quoted"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"group_size": 0}, "group_size=0"),
        ({"prompts_per_batch": 0}, "prompts_per_batch=0"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], quoted: str) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{quoted} must be greater than 0"):
        SamplingSettings(**({"group_size": 1, "temperature": 1.0, "max_new_tokens": 4} | settings))


def test_a_greedy_group_of_several_is_refused() -> None:
    with pytest.raises(ValueError, match="greedy=True gives 8 equal completions"):
        RolloutRequest([], SamplingSettings(group_size=8), greedy=True)
