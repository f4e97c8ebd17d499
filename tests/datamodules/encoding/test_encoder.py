from __future__ import annotations

import io
import pickle
import random
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

from datamodules.encoding.encoder import Batch, Encoder
from datamodules.encoding.mrope import mrope_positions
from datamodules.images.image_loading import load_image
from datamodules.samples.sample import BoxPart, LoadedSample, SampleError, TextPart
from tests.datamodules.encoding.tiny_processor import image_bytes, make_sample, save_tiny_processor
from tests.datamodules.image_mutations import PNG_MAGIC, encoded, pixels, png_chunk

IMAGE, START, END, TEXT = 7, 5, 6, 1
MIXED = ((84, 56), (20, 20), (56, 112), (10, 140), (300, 200), (56, 56))  # width, height


@pytest.fixture(scope="module")
def processor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def encoder(processor_dir: Path) -> Encoder:
    return Encoder(str(processor_dir), "absolute_pixels", "think", 1000, 200, with_target=True)


def rejected_rule(encoder: Encoder, loaded: LoadedSample) -> str:
    with pytest.raises(SampleError) as caught:
        encoder.encode(loaded)
    assert caught.value.sample_id == loaded.sample.id
    return caught.value.rule


def with_images(loaded: LoadedSample, *images: bytes) -> LoadedSample:
    return replace(loaded, images=images)


@pytest.mark.parametrize("num_images", range(1, 7))
def test_positions_equal_those_of_transformers(num_images: int) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 1},
    )
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    rng = random.Random(num_images)
    for _ in range(5):
        grids = torch.tensor([[1, 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)] for _ in range(num_images)])
        ids = [TEXT] * rng.randint(0, 4)
        for grid in grids:
            ids += [START, *[IMAGE] * int(grid.prod() // 4), END, *[TEXT] * rng.randint(0, 5)]
        input_ids = torch.tensor(ids)
        types = (input_ids == IMAGE).int()
        expected, delta = model.get_rope_index(input_ids[None], types[None], image_grid_thw=grids)
        positions, next_position = mrope_positions(input_ids, grids, IMAGE, merge_size=2)
        assert torch.equal(positions, expected[:, 0])
        assert next_position == len(ids) + int(delta)


def test_positions_of_adjacent_images_and_of_an_image_at_the_end() -> None:
    grids = torch.tensor([[1, 2, 4], [1, 4, 2]])
    positions, next_position = mrope_positions(torch.tensor([TEXT, IMAGE, IMAGE, IMAGE, IMAGE]), grids, IMAGE, 2)
    assert positions.tolist() == [[0, 1, 1, 3, 3], [0, 1, 1, 3, 4], [0, 1, 2, 3, 3]]
    assert next_position == 5


@pytest.mark.parametrize("ids", [[TEXT, IMAGE], [IMAGE, IMAGE, IMAGE], [IMAGE, TEXT, IMAGE]])
def test_positions_refuse_placeholders_that_do_not_fit_the_grids(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        mrope_positions(torch.tensor(ids), torch.tensor([[1, 2, 4]]), IMAGE, 2)


@pytest.mark.parametrize("sizes", [MIXED[:1], MIXED[:3], MIXED])
def test_encoding_equals_the_processor_given_all_images_at_once(
    encoder: Encoder, sizes: tuple[tuple[int, int], ...]
) -> None:
    loaded = make_sample("a", sizes)
    item = encoder.encode(loaded)
    text = encoder.processor.tokenizer.decode(item.input_ids)
    for pads in range(40, 0, -1):  # back to one placeholder per image
        text = text.replace("<|vision_start|>" + "<|image_pad|>" * pads, "<|vision_start|><|image_pad|>")
    images = [load_image(data, 10**6) for data in loaded.images]
    expected = encoder.processor(text=[text], images=images, return_tensors="pt")
    assert torch.equal(item.input_ids, expected["input_ids"][0])
    assert torch.equal(item.grid_thw, expected["image_grid_thw"])
    torch.testing.assert_close(item.pixel_values, expected["pixel_values"])


def test_patches_stay_with_their_image_and_a_small_image_does_not_shrink_the_others(encoder: Encoder) -> None:
    loaded = make_sample("a", MIXED)
    item = encoder.encode(loaded)
    blocks = item.pixel_values.split(item.grid_thw.prod(dim=1).tolist())
    for index, (size, block) in enumerate(zip(MIXED, blocks, strict=True)):
        alone = encoder.encode(with_images(make_sample("a", (size,)), loaded.images[index]))
        assert torch.equal(block, alone.pixel_values)
        assert torch.equal(item.grid_thw[index], alone.grid_thw[0])
        assert item.image_sizes[index] == alone.image_sizes[0]
        assert item.image_keys[index] == alone.image_keys[0]


def test_geometry_is_the_original_and_the_size_of_the_grid(encoder: Encoder) -> None:
    item = encoder.encode(make_sample("a", ((300, 200), (20, 20))))
    assert [sizes.original for sizes in item.image_sizes] == [(300, 200), (20, 20)]
    rows, columns = item.grid_thw[0, 1:].tolist()
    assert item.image_sizes[0].resized == (columns * 14, rows * 14)
    assert item.image_sizes[0].resized[0] * item.image_sizes[0].resized[1] <= 112 * 112
    assert item.image_sizes[1].resized == (28, 28)


def test_aspect_ratios_are_refused_where_the_processor_refuses_them(encoder: Encoder) -> None:
    loaded = make_sample("a", ((3, 601),))
    assert rejected_rule(encoder, loaded) == "extreme_aspect_ratio"
    with pytest.raises(ValueError, match="aspect ratio"):
        encoder.processor.image_processor(images=[load_image(loaded.images[0], 10**6)])
    assert encoder.encode(make_sample("a", ((3, 600),))).image_sizes[0].original == (3, 600)


def test_target_is_in_processed_pixels_and_ends_the_turn(encoder: Encoder) -> None:
    item = encoder.encode(make_sample("a", ((56, 56), (112, 84))))
    text = encoder.processor.tokenizer.decode(item.completion_ids)
    assert text.startswith("<think>It moved.</think><answer>")
    assert '"bbox_2d": [28, 21, 84, 83]' in text
    assert text.endswith("</answer><|im_end|>")
    assert encoder.processor.tokenizer.decode(item.input_ids).endswith("<|im_start|>assistant\n")


def test_without_target_there_is_no_completion(processor_dir: Path) -> None:
    encoder = Encoder(str(processor_dir), "absolute_pixels", "plain", 1000, 200, with_target=False)
    assert encoder.encode(make_sample("a", thinking=None)).completion_ids is None


def test_style_without_target_is_refused(processor_dir: Path) -> None:
    with pytest.raises(ValueError, match="style='plain'"):
        Encoder(str(processor_dir), "absolute_pixels", "plain", 1000, 200, with_target=True)


def test_resized_images_can_be_bounded(processor_dir: Path) -> None:
    encoder = Encoder(str(processor_dir), "absolute_pixels", "think", 1000, 200, True, max_resized_pixels=56 * 56)
    assert encoder.encode(make_sample("a", ((112, 112),))).image_sizes[0].resized == (56, 56)


def test_batch_holds_items_of_different_numbers_of_images(encoder: Encoder) -> None:
    items = [encoder.encode(make_sample(name, MIXED[:count])) for name, count in (("a", 1), ("b", 4))]
    batch = Batch(items, {"epoch": 1}).to("meta")
    assert batch.sample_ids == ["a", "b"] and len(batch) == 2 and batch.position == {"epoch": 1}
    assert [item.grid_thw.shape[0] for item in batch.items] == [1, 4]
    assert all(item.pixel_values.is_meta and item.completion_ids.is_meta for item in batch.items)
    assert not items[0].pixel_values.is_meta


def test_item_and_encoder_survive_pickling(encoder: Encoder) -> None:
    item = encoder.encode(make_sample("a"))
    copied = pickle.loads(pickle.dumps(encoder))
    assert "processor" not in copied.__dict__
    for other in (pickle.loads(pickle.dumps(item)), copied.encode(make_sample("a"))):
        assert other.sample == item.sample and other.next_position == item.next_position
        for name in ("input_ids", "positions", "pixel_values", "grid_thw", "completion_ids"):
            assert torch.equal(getattr(other, name), getattr(item, name))


def test_exif_orientation_is_applied_before_geometry(encoder: Encoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    buffer = io.BytesIO()
    Image.new("RGB", (84, 56)).save(buffer, "JPEG", exif=exif)
    item = encoder.encode(with_images(make_sample("a", ((84, 56),)), buffer.getvalue()))
    assert item.image_sizes[0].original == (56, 84)


def test_samples_that_cannot_be_encoded_are_named(processor_dir: Path, encoder: Encoder) -> None:
    loaded = make_sample("a")
    data = loaded.images[0]
    assert rejected_rule(encoder, with_images(loaded, data, data[: len(data) // 2])) == "truncated_image"
    assert rejected_rule(encoder, with_images(loaded, data, b"no image")) == "unreadable_image"
    assert rejected_rule(encoder, with_images(loaded, data)) == "missing_image"
    assert rejected_rule(encoder, with_images(loaded, data, image_bytes(3, 700))) == "extreme_aspect_ratio"
    assert rejected_rule(encoder, make_sample("a", thinking=None)) == "missing_thinking"
    injected = replace(loaded.sample, messages=(*loaded.sample.messages, TextPart("<|image_pad|>")))
    assert rejected_rule(encoder, replace(loaded, sample=injected)) == "reserved_token"
    split = replace(loaded.sample, messages=(*loaded.sample.messages, TextPart("<|i"), TextPart("m_end|>")))
    assert rejected_rule(encoder, replace(loaded, sample=split)) == "reserved_token"
    for limits, rule in (((20, 200), "prompt_too_long"), ((1000, 10), "completion_too_long")):
        assert rejected_rule(Encoder(str(processor_dir), "absolute_pixels", "think", *limits, True), loaded) == rule
    small = Encoder(str(processor_dir), "absolute_pixels", "think", 1000, 200, True, max_image_pixels=1000)
    assert rejected_rule(small, loaded) == "decompression_bomb"


def without_pixels(width: int, height: int) -> bytes:
    """The header of a PNG, after which decoding would say truncated_image."""
    header = png_chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")
    return PNG_MAGIC + header + (10**6).to_bytes(4, "big") + b"IDAT" + bytes(100)


def test_lengths_are_known_before_a_pixel_is_decoded(processor_dir: Path) -> None:
    loaded = with_images(make_sample("a"), without_pixels(560, 560), without_pixels(840, 560))
    for limits, rule in (((20, 200), "prompt_too_long"), ((1000, 10), "completion_too_long")):
        assert rejected_rule(Encoder(str(processor_dir), "absolute_pixels", "think", *limits, True), loaded) == rule
    assert (
        rejected_rule(Encoder(str(processor_dir), "absolute_pixels", "think", 1000, 200, True), loaded)
        == "truncated_image"
    )


def test_the_pixels_of_a_sample_are_bounded(processor_dir: Path) -> None:
    def encoder(**limits: int) -> Encoder:
        return Encoder(str(processor_dir), "absolute_pixels", "think", 10**6, 200, True, **limits)

    twelve = with_images(make_sample("a", ((8, 8),) * 12), *[without_pixels(8000, 8000)] * 12)
    assert rejected_rule(encoder(), twelve) == "too_many_pixels"
    loaded = make_sample("a", ((56, 56), (84, 56)))
    assert encoder(max_sample_pixels=56 * 140).encode(loaded).image_sizes
    assert rejected_rule(encoder(max_sample_pixels=56 * 140 - 1), loaded) == "too_many_pixels"


def test_grids_known_from_headers_are_those_of_the_processor(processor_dir: Path) -> None:
    rng = random.Random(0)
    for limit in (None, 56 * 56):
        encoder = Encoder(str(processor_dir), "absolute_pixels", "think", 1000, 200, True, max_resized_pixels=limit)
        for _ in range(100):
            size = rng.randint(1, 300), rng.randint(2, 300)
            _, _, grid = encoder._patches(Image.new("RGB", size))
            assert torch.equal(encoder._grid(size), grid), size


def test_pixels_of_one_stored_image_at_a_time_are_held(processor_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(str(processor_dir), "absolute_pixels", "think", 1000, 200, True)
    seen: list[weakref.ref[Image.Image]] = []
    order: list[str] = []
    patches, load = encoder._patches, ImageFile.ImageFile.load

    def watched_patches(image: Image.Image) -> object:
        seen.append(weakref.ref(image))
        order.append("patches")
        return patches(image)

    def watched_load(image: ImageFile.ImageFile) -> object:
        assert all(other() is None for other in seen), "an image is held while the next is decoded"
        if order[-1:] != ["decode"]:  # Pillow calls this again on what is decoded already
            order.append("decode")
        return load(image)

    monkeypatch.setattr(encoder, "_patches", watched_patches)
    monkeypatch.setattr(ImageFile.ImageFile, "load", watched_load)
    encoder.encode(make_sample("a", MIXED))
    assert order == ["decode", "patches"] * len(MIXED)


def test_a_png_that_is_turned_behind_its_pixels_gets_the_prompt_of_an_upright_one(encoder: Encoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = pixels(1, size=(84, 56))
    whole = encoded(image, "PNG")
    late = whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]
    upright = encoded(image.transpose(Image.Transpose.ROTATE_270), "PNG")
    loaded = make_sample("a", ((56, 84),))
    question = BoxPart(0, (0.1, 0.2, 0.9, 0.7), "box")
    loaded = replace(loaded, sample=replace(loaded.sample, messages=(*loaded.sample.messages, question)))
    turned, expected = (encoder.encode(with_images(loaded, data)) for data in (late, upright))
    assert turned.image_sizes == expected.image_sizes and turned.image_sizes[0].original == (56, 84)
    for name in ("input_ids", "positions", "pixel_values", "grid_thw", "completion_ids"):
        assert torch.equal(getattr(turned, name), getattr(expected, name)), name
