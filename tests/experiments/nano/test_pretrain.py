"""Base training: the language stage against plain forwards, then whole runs: resume, and what a folder may hold."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from datamodules.encoding.encoder import EncodedSample
from datamodules.encoding.mrope import mrope_positions
from datamodules.persistence import folder_lock
from datamodules.persistence.processes import ENDED, process_state
from datamodules.samples.answer_text import ParsedAnswer, parse_answer
from datamodules.synthetic.interleaved import interleaved_scenes
from datamodules.synthetic.single_image import Turn, single_scene
from datamodules.synthetic.world import draw_scene
from experiments.nano import build_model, drawing_tasks, pretrain
from experiments.nano.drawing_tasks import HELD_OUT, PictureEncoder, PictureSet, accuracy, named_picture_accuracy
from experiments.nano.language import InterleavedStage, LanguageStage
from experiments.nano.loop import CHECKPOINT, LOG, StageRun, average_gradients, build_optimizers, learning_rate_factor
from experiments.nano.muon import Muon
from experiments.nano.pretrain import train
from experiments.nano.settings import PretrainSettings
from experiments.nano.vision_tower import TowerStage
from lightning_modules.models.qwen_vl import QwenVL
from tests.experiments.conftest import ROOT

TINY = PretrainSettings(
    text_width=64,
    text_depth=1,
    vision_width=32,
    vision_depth=1,
    tower_pictures=12,
    tower_batch=2,
    tower_learning_rate=5e-4,
    language_pictures=12,
    language_batch=2,
    interleaved_sets=12,
    interleaved_batch=2,
    grounding_turns=2,
    max_tokens_per_row=600,
    num_eval=3,
)


@pytest.fixture(autouse=True)
def _small_corpus_and_denormals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pretrain, "build_processor", partial(build_model.build_processor, corpus_size=40))
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def processor(tiny_model_dir: Path):
    return AutoProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture
def encoder(processor) -> PictureEncoder:
    return PictureEncoder(processor, grounding_turns=2)


def picture_image(stream: str, index: int) -> Image.Image:
    return draw_scene(single_scene(random.Random(f"{stream}:{index}")))


def plain_prompt(processor, question: str) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, add_vision_id=True, tokenize=False)


def test_a_prompt_is_what_the_processor_makes_of_the_plain_conversation(processor, encoder: PictureEncoder) -> None:
    for index in range(6):
        picture = encoder.picture("train:0", index)
        for number, turn in enumerate(picture.turns):
            item = encoder.prompt(picture, number)
            text = plain_prompt(processor, turn.question)
            assert "Picture 1: " in text
            expected = processor(text=[text], images=[picture_image("train:0", index)], return_tensors="pt")
            assert torch.equal(item.input_ids, expected["input_ids"][0])
            assert torch.equal(item.grid_thw, expected["image_grid_thw"])
            assert torch.equal(item.pixel_values, expected["pixel_values"])
            merge = processor.image_processor.merge_size
            positions, after = mrope_positions(item.input_ids, item.grid_thw, processor.image_token_id, merge)
            assert torch.equal(item.positions, positions) and item.next_position == after


def test_completions_hold_question_and_answer_and_mark_the_answer(processor, encoder: PictureEncoder) -> None:
    picture = encoder.picture("train:0", 3)
    marks = picture.is_answer.split([len(ids) for ids in picture.completions])
    for turn, ids, mark in zip(picture.turns, picture.completions, marks, strict=True):
        text = plain_prompt(processor, turn.question).split("<|vision_end|>")[1]
        assert processor.tokenizer.decode(ids) == f"{text}{turn.answer}<|im_end|>"
        assert processor.tokenizer.decode(ids[mark]) == f"{turn.answer}<|im_end|>"


def plain_conversation(processor, count: int, turns: Sequence[Turn]) -> str:
    """The chat template's text of a conversation about `count` pictures, up to the last answer."""
    messages: list[dict] = []
    for turn in turns:
        images = [] if messages else [{"type": "image"}] * count
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return processor.apply_chat_template(messages, add_vision_id=True, tokenize=False).removesuffix("\n")


def test_sets_of_pictures_are_what_the_processor_makes_of_plain_conversations(
    processor, encoder: PictureEncoder
) -> None:
    counts, lengths = set(), set()
    for index in range(40):
        pictures = encoder.interleaved("interleaved:0", index)
        counts.add(len(pictures.item.image_sizes))
        if index % 4 == 0:
            assert torch.equal(pictures.item.input_ids, encoder.picture("interleaved:0", index).item.input_ids)
            continue
        scenes = interleaved_scenes(random.Random(f"interleaved:0:{index}"))
        marks = pictures.is_answer.split([len(ids) for ids in pictures.completions])
        for turns, ids, mark in zip(pictures.conversations, pictures.completions, marks, strict=True):
            lengths.add(len(turns))
            text = plain_conversation(processor, len(scenes), turns)
            expected = processor(text=[text], images=[draw_scene(scene) for scene in scenes], return_tensors="pt")
            prefix = expected["input_ids"][0, : len(pictures.item.input_ids)]
            assert torch.equal(pictures.item.input_ids, prefix)
            # Token by token the text may split elsewhere, because answers are tokenized alone, as they are generated.
            rest = processor.tokenizer.decode(expected["input_ids"][0, len(prefix) :])
            assert processor.tokenizer.decode(ids) == rest
            assert processor.tokenizer.decode(ids[mark]) == "".join(f"{turn.answer}<|im_end|>" for turn in turns)
            assert torch.equal(pictures.item.pixel_values, expected["pixel_values"])
            assert torch.equal(pictures.item.grid_thw, expected["image_grid_thw"])
        merge = processor.image_processor.merge_size
        positions, after = mrope_positions(
            pictures.item.input_ids, pictures.item.grid_thw, processor.image_token_id, merge
        )
        assert torch.equal(pictures.item.positions, positions) and pictures.item.next_position == after
    assert counts == {1, 2, 3, 4, 5, 6} and lengths == {1, 2}


def test_any_token_that_is_text_is_an_answer_now_and_then(encoder: PictureEncoder) -> None:
    turns = [encoder.picture("train:0", index).turns[-1] for index in range(300)]
    assert all(turn.task == "repeating" and turn.question == f"Output: {turn.answer}" for turn in turns)
    answers = "".join(turn.answer for turn in turns)
    pieces = [piece for piece in encoder.pieces if not piece.isspace()]
    assert {"<think>", "</answer>"} <= set(pieces) and "<|image_pad|>" not in pieces
    assert sum(piece in answers for piece in pieces) > 0.9 * len(pieces)
    assert any(ord(letter) > 0x7FF for letter in answers)


def plain_losses(model: nn.Module, processor, batch: list[PictureSet], first: int) -> tuple[Tensor, int]:
    """Negative log-likelihood of all answer tokens and their number, one plain conversation after another."""
    total, count = torch.zeros(()), 0
    for index, picture in enumerate(batch, first):
        for turn in picture.turns:
            text, image = plain_prompt(processor, turn.question), picture_image("train:0", index)
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            # An answer's tokens follow the prompt's as they are written, which is not how the joined text would split.
            answer = processor.tokenizer(f"{turn.answer}<|im_end|>", return_tensors="pt")["input_ids"]
            marks = {"attention_mask": torch.ones_like(answer), "mm_token_type_ids": torch.zeros_like(answer)}
            for name, values in {"input_ids": answer, **marks}.items():
                inputs[name] = torch.cat([inputs[name], values], dim=1)
            logits = model(**inputs).logits[0, -answer.shape[1] - 1 : -1]
            total = total - logits.log_softmax(-1)[torch.arange(answer.shape[1]), answer[0]].sum()
            count += answer.shape[1]
    return total, count


@pytest.fixture
def stage(tiny_model_dir: Path) -> LanguageStage:
    settings = replace(TINY, language_pictures=9, language_batch=3, max_tokens_per_row=500)  # several rows
    return LanguageStage(settings, tiny_model_dir)


def trained(stage: LanguageStage) -> dict[str, nn.Parameter]:
    return {name: p for name, p in stage.policy.base.named_parameters() if p.requires_grad}


def test_side_by_side_turns_have_the_loss_and_gradient_of_plain_forwards(
    tiny_model_dir: Path, processor, stage: LanguageStage
) -> None:
    batch = next(stage.batches(1))
    plain = AutoModelForImageTextToText.from_pretrained(tiny_model_dir, dtype=torch.float32)
    expected, expected_count = plain_losses(plain, processor, batch, first=3)
    expected.backward()
    total, count = stage.loss(batch)
    assert count == expected_count
    assert total == pytest.approx(expected.item(), rel=1e-5)
    parameters = trained(stage)
    assert parameters and not any("visual" in name for name in parameters)
    for name, parameter in plain.named_parameters():
        if name in parameters:
            scale = max(parameter.grad.abs().max().item(), 1e-3)
            torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-3, atol=2e-4 * scale, msg=name)


def test_shares_of_a_batch_add_up_to_its_mean(stage: LanguageStage) -> None:
    """What two processes do, without the processes: each takes its share, and gradients of sums are added."""
    parameters = list(trained(stage).values())
    whole = next(stage.batches(1))
    shares = [next(stage.batches(1, rank, 2)) for rank in range(2)]
    keys = sorted(picture.item.image_keys for share in shares for picture in share)
    assert keys == sorted(picture.item.image_keys for picture in whole)
    loss = average_gradients(parameters, *stage.loss(whole))
    expected = [parameter.grad.clone() for parameter in parameters]
    stage.policy.zero_grad()
    sums = [stage.loss(share) for share in shares]
    shared = average_gradients(parameters, sum(total for total, _ in sums), sum(count for _, count in sums))
    assert shared == pytest.approx(loss, rel=1e-6)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_stream_starts_anywhere_and_has_a_seed(tiny_model_dir: Path, stage: LanguageStage) -> None:
    keys = [[picture.item.image_keys for picture in batch] for batch in stage.batches(0)]
    assert [[picture.item.image_keys for picture in batch] for batch in stage.batches(2)] == keys[2:]
    other = LanguageStage(replace(stage.settings, seed=1), tiny_model_dir)
    assert {p.item.image_keys for batch in other.batches(0) for p in batch}.isdisjoint(
        name for names in keys for name in names
    )


def test_held_out_pictures_are_none_of_the_trained(encoder: PictureEncoder) -> None:
    held_out = {encoder.picture(HELD_OUT, index).item.image_keys for index in range(20)}
    trained = {encoder.picture("train:0", index).item.image_keys for index in range(60)}
    assert len(held_out) == 20 and held_out.isdisjoint(trained)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, warmup=0.1, decay=0.5) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(factors[10:51]) == {1.0}
    assert factors[50:] == pytest.approx([(100 - step) / 50 for step in range(50, 100)])


def test_each_parameter_has_one_optimizer_and_muon_the_matrices_inside(tiny_model_dir: Path) -> None:
    policy = QwenVL(str(tiny_model_dir), freeze_vision=False)
    muon, adamw = build_optimizers(policy.base.named_parameters(), 1e-3)
    assert isinstance(muon, Muon)
    held = [p for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held) == len(list(policy.base.parameters()))
    embeddings = policy.base.get_input_embeddings().weight
    assert all(p.ndim == 2 and p is not embeddings for p in muon.param_groups[0]["params"])
    assert any(p is embeddings for p in adamw.param_groups[0]["params"])


def test_accuracy_counts_boxes_and_failures(
    tiny_model_dir: Path, encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        """Answers the first two rightly, the third with a box elsewhere, the fourth not at all."""

        def __init__(self, policy: QwenVL) -> None: ...

        def generate(self, request):
            assert request.greedy
            answers = [encoder.picture(HELD_OUT, index).turns[0].answer for index in range(2)]
            texts = [*answers, '{"bbox_2d": [0, 0, 1, 1]}', "nothing"]
            return [[SimpleNamespace(text=text)] for text in texts[: len(request.items)]]

    monkeypatch.setattr(drawing_tasks, "NativeEngine", Engine)
    scores = accuracy(None, encoder, 4)
    assert (scores["single_image_acc"], scores["parse_failures"]) == (50.0, 25.0)
    assert 40 < scores["single_image_iou"] < 51
    assert isinstance(parse_answer(encoder.picture(HELD_OUT, 0).turns[0].answer), ParsedAnswer)


def test_questions_that_name_a_picture_are_scored_in_that_picture(
    encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EncodedSample] = []

    class Engine:
        """Answers every question with the right box, in the resized pixels of the picture that it names."""

        def __init__(self, policy: QwenVL) -> None: ...

        def generate(self, request):
            asked.extend(request.items)
            sets = [encoder.interleaved(HELD_OUT, index) for index in (1, 2, 3, 5, 6, 7)]
            return [[SimpleNamespace(text=pictures.turns[0].answer)] for pictures in sets]

    monkeypatch.setattr(drawing_tasks, "NativeEngine", Engine)
    assert named_picture_accuracy(None, encoder, 6) == {"named_picture_acc": 100.0}
    assert all(len(item.image_sizes) > 1 for item in asked)


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def train_tiny(folder: Path, settings: PretrainSettings = TINY) -> dict[str, Tensor]:
    return train(settings, folder, save_every=2, eval_every=100, log_every=1).base.state_dict()


def killed_at(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: type, step: int) -> None:
    """A run that is killed in the step after `step` of a stage."""
    calls, loss = 0, kind.loss

    def failing(self, batch):
        nonlocal calls
        calls += 1
        if calls > step:
            raise Killed
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", failing)
        with pytest.raises(Killed):
            train_tiny(folder)


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("finished") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "build_processor", partial(build_model.build_processor, corpus_size=40))
        return folder, train_tiny(folder)


def test_a_finished_folder_loads_plainly_and_has_its_log(finished: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = finished
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".jsonl", ".safetensors"}
    model = AutoModelForImageTextToText.from_pretrained(folder)
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    header, *steps = records(folder)
    assert header == {"settings": asdict(TINY)}
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6] * 3
    assert [record["stage"] for record in steps] == ["tower"] * 6 + ["language"] * 6 + ["interleaved"] * 6
    assert "cell_kind_acc" in steps[5] and "single_image_acc" in steps[11] and "single_image_acc" not in steps[6]
    assert {"single_image_acc", "named_picture_acc"} < steps[-1].keys()
    assert steps[5]["loss"] < steps[1]["loss"] and steps[11]["loss"] < steps[6]["loss"]


@pytest.mark.parametrize("kind", [TowerStage, LanguageStage, InterleavedStage])
@pytest.mark.parametrize("step", [0, 1, 5])  # at a stage's start, before its first checkpoint, and past one
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    kind: type,
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, expected = finished
    killed_at(monkeypatch, tmp_path, kind, step)
    assert (tmp_path / CHECKPOINT).exists() == (kind is not TowerStage or step == 5)
    done = [record for record in records(tmp_path)[1:] if record["stage"] == kind.name]
    assert len(done) == step
    weights = train_tiny(tmp_path)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert records(tmp_path) == records(folder)
    assert not (tmp_path / CHECKPOINT).exists()


def make_base(monkeypatch: pytest.MonkeyPatch, folder: Path, settings: PretrainSettings) -> None:
    flags = [f"--{name}={value}" for name, value in asdict(settings).items()]
    monkeypatch.setattr("sys.argv", ["pretrain", f"--output={folder}", "--processes=2", *flags])
    pretrain.main()


def test_a_finished_folder_is_left_as_it_is(
    finished: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train_tiny(folder)
    make_base(monkeypatch, folder, TINY)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert capsys.readouterr().out.count("is there already") == 1, "once for all processes"


def test_a_folder_of_other_settings_is_told_in_one_line(
    finished: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^no base model: .*tower_batch=2 there and 3 here"):
        make_base(monkeypatch, finished[0], replace(TINY, tower_batch=3))


def test_other_settings_in_the_same_folder_are_refused(finished: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"tower_learning_rate=0\.0005 there and 0\.5 here"):
        train_tiny(finished[0], replace(TINY, tower_learning_rate=0.5))


def test_a_model_from_elsewhere_is_not_overwritten(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="without training_log"):
        train_tiny(tiny_model_dir)


def test_saving_between_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_every=3 must be a multiple of log_every=2"):
        train(TINY, tmp_path / "base", save_every=3, log_every=2)
    assert not (tmp_path / "base").exists()


def test_its_processes_end_with_the_command(tmp_path: Path) -> None:
    sizes = [f"--{name}={value}" for name, value in asdict(TINY).items()]
    command = [sys.executable, "-m", "experiments.nano.pretrain", "--processes=2", f"--output={tmp_path / 'base'}"]
    with subprocess.Popen([*command, *sizes], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        children: list[int] = []
        while not children:  # the tracker of multiprocessing's resources is a child too
            assert run.poll() is None, "it ended before it had started processes"
            found = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            children = [int(pid) for pid in found] if len(found) >= 2 else []
            time.sleep(0.05)
        run.kill()
    for pid in children:
        while process_state(pid)[0] not in ENDED:
            time.sleep(0.05)


def test_without_interleaved_sets_there_are_two_stages_and_an_older_log_is_accepted(tmp_path: Path) -> None:
    settings = replace(TINY, interleaved_sets=0)
    train_tiny(tmp_path, settings)
    assert {record["stage"] for record in records(tmp_path)[1:]} == {"tower", "language"}
    lines = (tmp_path / LOG).read_text().splitlines()
    header = json.loads(lines[0])
    for name in ("interleaved_sets", "interleaved_batch", "interleaved_learning_rate"):
        del header["settings"][name]
    (tmp_path / LOG).write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    assert pretrain.is_finished(replace(settings, interleaved_batch=16), tmp_path)
    with pytest.raises(ValueError, match="interleaved_sets=0 there and 12 here"):
        pretrain.is_finished(replace(TINY, interleaved_batch=16), tmp_path)


def interrupted(folder: Path) -> Path:
    """A folder that a run has left with a checkpoint of its third step, and with a record of the fourth."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"stage": "tower", "step": 3}, folder / CHECKPOINT)
    records = [{"settings": asdict(TINY)}, *({"stage": "tower", "step": step} for step in (2, 3, 4))]
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_log_that_a_kill_has_cut_costs_its_last_line_only(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "base")
    text = (folder / LOG).read_text()
    (folder / LOG).write_text(text[:-5])
    assert not pretrain.is_finished(TINY, folder)
    pretrain.prepare_folder(TINY, folder)
    assert (folder / LOG).read_text() == "".join(text.splitlines(keepends=True)[:3])


def test_a_kill_while_the_finished_model_is_saved_leaves_one_that_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("untrained")
    (tmp_path / CHECKPOINT).touch()
    run = StageRun.__new__(StageRun)

    def save(folder: Path, is_killed: bool) -> None:
        (Path(folder) / "model.safetensors").write_text("tra" if is_killed else "trained")
        if is_killed:
            raise KeyboardInterrupt

    for is_killed, model in ((True, "untrained"), (False, "trained")):
        save_pretrained = partial(save, is_killed=is_killed)
        run.rank, run.folder, run.policy = (
            0,
            tmp_path,
            SimpleNamespace(base=SimpleNamespace(save_pretrained=save_pretrained)),
        )
        with pytest.raises(KeyboardInterrupt) if is_killed else nullcontext():
            run.finish()
        assert (tmp_path / "model.safetensors").read_text() == model
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_one_command_at_a_time_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr(pretrain, "train", lambda settings, folder: held.append(folder_lock.is_locked(folder)))
    monkeypatch.setattr("sys.argv", ["pretrain", "--output", str(tmp_path / "base")])
    pretrain.main()
    assert held == [True]
