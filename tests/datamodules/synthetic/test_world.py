"""Scenes and how they are drawn: boxes are tight, things keep apart, equal scenes give equal pixels."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from datamodules.samples.boxes import box_fault
from datamodules.synthetic.single_image import crowd, single_scene
from datamodules.synthetic.world import (
    KINDS,
    MARGIN,
    SIZES,
    Scene,
    Thing,
    crop_scene,
    draw_scene,
    encode_png,
    place,
    random_background,
    random_scene,
)
from experiments.nano.build_model import MAX_PIXELS, MIN_PIXELS

FACTOR = 28  # patch size times merge size


def pixels(scene: Scene) -> np.ndarray:
    """[height, width, 3]"""
    return np.asarray(draw_scene(scene))


def pixel_box(scene: Scene, thing: Thing) -> tuple[float, ...]:
    return tuple(value * size for value, size in zip(thing.box, (*scene.size, *scene.size), strict=True))


def changed_box(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int, int]:
    """End-exclusive xyxy of the pixels that differ."""
    rows, columns = np.nonzero((before != after).any(axis=-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_names_and_kinds_correspond_one_to_one() -> None:
    assert len({kind.name for kind in KINDS}) == len(set(KINDS)) == len(KINDS) == 72


@pytest.mark.parametrize("size", SIZES)
def test_the_box_of_every_kind_is_tight_around_its_pixels(size: tuple[int, int]) -> None:
    rng = random.Random(str(size))
    for kind in KINDS:
        for scale in ((0.08, 0.11), (0.24, 0.42), (0.4, 0.6)):
            thing = Thing(kind, place(rng, size, [], scale))
            empty = Scene(size, random_background(rng), ())
            scene = replace(empty, things=(thing,))
            assert changed_box(pixels(empty), pixels(scene)) == pytest.approx(pixel_box(scene, thing), abs=1e-9)


def test_a_thing_adds_pixels_in_its_own_box_only() -> None:
    for seed in range(60):
        scene = random_scene(random.Random(seed), crowd(random.Random(seed), 4))
        whole = pixels(scene)
        for thing in scene.things:
            without = replace(scene, things=tuple(other for other in scene.things if other != thing))
            assert changed_box(pixels(without), whole) == pytest.approx(pixel_box(scene, thing), abs=1e-9)


def test_things_lie_inside_and_two_pixels_apart() -> None:
    for seed in range(300):
        scene = single_scene(random.Random(seed))
        for thing in scene.things:
            x0, y0, x1, y1 = pixel_box(scene, thing)
            assert box_fault(thing.box) is None
            assert min(x0, y0) >= 1 and x1 <= scene.size[0] - 1 and y1 <= scene.size[1] - 1
            assert min(x1 - x0, y1 - y0) > 4.999
        for a, b in combinations((pixel_box(scene, thing) for thing in scene.things), 2):
            gap = max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
            assert gap > 1.999


def test_a_scene_holds_just_the_kinds_asked_for() -> None:
    for count in (1, 3, 6):
        kinds = crowd(random.Random(count), count)
        assert len(set(kinds)) == count
        assert random_scene(random.Random(0), kinds).kinds == tuple(kinds)


def test_no_room_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"no room for 1 things in a picture of \(6, 6\)"):
        random_scene(random.Random(0), [KINDS[0]], size=(6, 6))


def test_equal_scenes_give_equal_bytes_and_hashes() -> None:
    first, second = (single_scene(random.Random("equal")) for _ in range(2))
    assert first is not second
    assert first.content_hash() == second.content_hash()
    assert encode_png(draw_scene(first)) == encode_png(draw_scene(second))


@pytest.mark.parametrize("field", ["size", "background", "things", "frame"])
def test_each_field_counts_in_the_content_hash(field: str) -> None:
    scene = Scene((84, 84), (100, 120, 5, 1), (Thing(KINDS[0], (0.1, 0.1, 0.5, 0.5)),))
    other = {"size": (112, 84), "background": (100, 120, 5, 2), "things": (), "frame": (0.1, 0.1, 0.5, 0.5)}[field]
    assert replace(scene, **{field: other}).content_hash() != scene.content_hash()


def test_a_frame_is_red_and_covers_no_thing() -> None:
    for seed in range(60):
        scene = random_scene(random.Random(seed), crowd(random.Random(seed), 3))
        thing = scene.things[seed % 3]
        plain, framed = pixels(scene), pixels(scene.with_frame(thing.box))
        changed = (plain != framed).any(axis=-1)
        assert (framed[changed] == (255, 0, 0)).all()
        for other in scene.things:
            x0, y0, x1, y1 = (round(value) for value in pixel_box(scene, other))
            assert not changed[y0:y1, x0:x1].any()
        x0, y0, x1, y1 = (round(value) for value in pixel_box(scene, thing))
        # All around: the ring of pixels next to the box has changed (but for what was as red before).
        ring = framed[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1].copy()
        ring[1:-1, 1:-1] = (255, 0, 0)
        assert (ring == (255, 0, 0)).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_dark_margin_runs_around_every_picture(size: tuple[int, int]) -> None:
    picture = pixels(Scene(size, (140, 150, 10, 7), ())) == MARGIN
    dark = picture.all(axis=-1)
    assert dark[:2].all() and dark[-2:].all() and dark[:, :2].all() and dark[:, -2:].all()
    assert not dark[5:-5, 5:-5].any()


def test_a_crop_is_that_part_of_the_picture() -> None:
    scene = single_scene(random.Random(5))
    width, height = scene.size
    crop = crop_scene(scene, (10 / width, 20 / height, 50 / width, 45 / height))
    assert np.array_equal(np.asarray(crop), pixels(scene)[20:45, 10:50])


def test_sizes_cover_several_shapes_and_most_are_resized() -> None:
    resized = {size: smart_resize(size[1], size[0], FACTOR, MIN_PIXELS, MAX_PIXELS)[::-1] for size in SIZES}
    assert set(resized.values()) == {(112, 84), (84, 112), (84, 84), (112, 56)}
    assert sum(size != new for size, new in resized.items()) >= 5
    assert any(round(new[0] / size[0], 3) != round(new[1] / size[1], 3) for size, new in resized.items())
    assert len({width / height for width, height in SIZES}) >= 4
