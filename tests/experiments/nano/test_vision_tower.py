"""The dense targets of the tower stage: what a cell shows, and that they are true of the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datamodules.checkpoints.pretrained import new_model
from datamodules.synthetic.world import COLOURS, FILLS, SHAPES, Kind, Thing
from experiments.nano import build_model
from experiments.nano.settings import PretrainSettings
from experiments.nano.vision_tower import NOTHING, TowerStage, inside, owner, view

LEFT = Thing(Kind("star", "blue"), (0.0, 0.0, 0.4, 0.4))
RIGHT = Thing(Kind("cross", "red"), (0.5, 0.1, 0.9, 0.6))
STREAM = [view("test", index) for index in range(80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small model with the nano image processor."""
    processor = build_model.build_processor(corpus_size=40)
    folder = tmp_path_factory.mktemp("nano")
    processor.save_pretrained(folder)
    new_model(build_model.build_config(processor.tokenizer, text=(128, 1), vision=(64, 2))).save_pretrained(folder)
    return folder


@pytest.fixture
def stage(folder: Path) -> TowerStage:
    return TowerStage(PretrainSettings(text_width=128, tower_pictures=8, tower_batch=4), folder)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ((0.0, 0.0, 0.25, 0.25), LEFT),
        ((0.5, 0.25, 0.75, 0.5), RIGHT),
        ((0.25, 0.0, 0.75, 0.5), RIGHT),  # covers more of the right one
        ((0.15, 0.15, 1.0, 0.3), LEFT),  # the left one's centre is here, though the right one covers more
        ((0.0, 0.75, 0.25, 1.0), None),
        ((0.38, 0.38, 0.5, 0.5), None),  # a corner of the left one is too little
    ],
)
def test_a_cell_shows_the_thing_centred_in_it_or_covering_most_of_it(cell, expected) -> None:
    assert owner([LEFT, RIGHT], cell) == expected
    assert owner([RIGHT, LEFT], cell) == expected


def test_a_box_inside_a_crop_keeps_its_pixels() -> None:
    assert inside((0.3, 0.25, 0.5, 0.5), (0.2, 0.25, 0.6, 0.75)) == pytest.approx((0.25, 0.0, 0.75, 0.5))


def test_a_stream_mixes_scenes_large_things_and_close_ups() -> None:
    areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for v in STREAM if len(v.things) == 1 for t in v.things]
    assert sum(area > 0.6 for area in areas) > 3  # close-ups
    assert sum(len(v.things) > 2 for v in STREAM) > 20
    assert sum(v.framed is not None for v in STREAM) > 2
    assert all(v.framed is None or v.framed in v.things for v in STREAM)


def test_things_are_where_their_boxes_say() -> None:
    """The middle row of a solid thing's box holds its colour, in scenes and in close-ups alike."""
    checked = 0
    for picture in STREAM:
        for thing in picture.things:
            if thing.kind.fill == "hollow":
                continue
            width, height = picture.image.size
            x, y = (thing.box[0] + thing.box[2]) / 2 * width, (thing.box[1] + thing.box[3]) / 2 * height
            assert picture.image.getpixel((int(x), int(y))) == COLOURS[thing.kind.colour]
            checked += 1
    assert checked > 80


def test_targets_name_kind_frame_and_box_of_every_cell(stage: TowerStage) -> None:
    framed = next(v for v in STREAM if v.framed is not None)
    cells = stage.cells([framed, STREAM[0]])
    assert len(cells.kinds) == len(cells.boxes) == cells.grid_thw.prod(-1).sum() // 4 == len(stage.tokens(cells))
    merge = stage.image_processor.merge_size
    rows, columns = (int(n) // merge for n in cells.grid_thw[0, 1:])
    marked = 0
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        cell = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        thing, kinds = owner(framed.things, cell), cells.kinds[number].tolist()
        if thing is None:
            assert kinds[0] == NOTHING
            continue
        named = SHAPES[kinds[0]], tuple(COLOURS)[kinds[1]], FILLS[kinds[2]]
        assert named == (thing.kind.shape, thing.kind.colour, thing.kind.fill)
        assert bool(kinds[3]) == (thing == framed.framed)
        marked += kinds[3]
        size = torch.tensor([columns, rows, columns, rows]) * 28
        assert (cells.boxes[number] - torch.tensor(thing.box) * size).abs().max() <= 1
    assert marked > 0


def test_the_loss_has_a_gradient_in_tower_and_heads_only_and_falls_with_the_truth(stage: TowerStage) -> None:
    batch = next(stage.batches(0))
    total, count = stage.loss(batch)
    assert count == len(batch.kinds) and total > 0
    with_gradient = {name for name, p in stage.policy.base.named_parameters() if p.grad is not None}
    assert with_gradient and all("visual" in name for name in with_gradient)
    assert all(p.grad is not None for p in stage.heads.parameters())
    tokens = torch.randn(3, 128)
    kinds, boxes = stage.heads.read(tokens)
    good = stage.heads.loss(tokens, kinds, boxes.round().long().clamp(0, 119))
    bad = stage.heads.loss(tokens, (kinds + 1) % torch.tensor([6, 6, 2, 2]), 119 - boxes.round().long().clamp(0, 119))
    assert good < bad


def test_shares_cover_a_batch_and_the_stream_starts_anywhere(stage: TowerStage) -> None:
    whole = next(stage.batches(1))
    shares = [next(stage.batches(1, rank, 2)) for rank in range(2)]
    assert sum(len(share.kinds) for share in shares) == len(whole.kinds)
    second = list(stage.batches(0))[1]
    assert torch.equal(second.pixel_values, whole.pixel_values) and torch.equal(second.boxes, whole.boxes)
    stage.settings = replace(stage.settings, seed=1)
    assert not torch.equal(next(stage.batches(1)).pixel_values[:4], whole.pixel_values[:4])
