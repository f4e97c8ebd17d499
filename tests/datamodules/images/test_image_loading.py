from __future__ import annotations

import importlib.util
import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from datamodules.images.image_loading import (
    ImageError,
    decode_images,
    load_image,
    open_image,
    open_images,
)
from datamodules.samples.sample import LoadedSample, SampleError
from tests.beside import SHARED
from tests.datamodules.encoding.tiny_processor import image_bytes, make_sample
from tests.datamodules.image_mutations import PNG_MAGIC, encoded, grey16, pixels, png_chunk

CASES = SHARED / "cases/inputs.py"
GREY = np.asarray(pixels(0, "L"))


def rule_of(data: bytes, max_pixels: int = 10**6) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(data, max_pixels)
    return caught.value.rule


def sample_rule(*images: bytes, **limits: int) -> str:
    sample = make_sample("a", ((4, 4),) * len(images)).sample
    with pytest.raises(SampleError) as caught:
        list(decode_images(sample.id, open_images(LoadedSample(sample, images), **limits)))
    return caught.value.rule


def shown(data: bytes) -> np.ndarray:
    """The image as a model sees it: [rows, columns, 3], 0 to 255."""
    return np.asarray(load_image(data, 10**6)).astype(int)


def tiff(rows: np.ndarray, bits: int, packed: bytes, photometric: int = 1) -> bytes:
    """An uncompressed little-endian grey TIFF, written by hand."""
    height, width = rows.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 12 * 9 + 4)]
    entries += [(277, 1), (278, height), (279, len(packed))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + packed


def pack12(rows: np.ndarray) -> bytes:
    bits = "".join(f"{value:012b}" for value in rows.flatten())
    return bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


# -------------------------------------------------------------------------------------------------- ordinary images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_ordinary_images_are_what_pillow_makes_of_them(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "L", "P", "RGBA"):
        if mode == "RGBA" and kind in ("JPEG", "PPM", "BMP"):
            continue
        image = pixels(1).quantize(8) if mode == "P" else pixels(1, mode)
        if kind in ("JPEG", "PPM") and mode == "P":
            continue
        data = encoded(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if mode == "RGBA" or reference.has_transparency_data:
            layer = reference.convert("RGBA")
            reference = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        assert load_image(data, 10**6).tobytes() == reference.convert("RGB").tobytes(), (mode, orientation)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_that_is_shown_is_known_from_the_header(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pixels(1, size=(24, 16)), kind, exif=exif)
    stored = open_image(data)
    assert stored.size == ((24, 16) if orientation < 5 else (16, 24))
    assert stored.orientation() == (1 if kind == "TIFF" else orientation), "Pillow turns a TIFF itself"
    assert stored.decode().size == stored.size


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO", "PNG"])
def test_only_the_first_frame_of_an_animation_counts(kind: str) -> None:
    first, others = pixels(1), [pixels(seed) for seed in range(2, 40)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=others, **lossless)
    assert open_image(data).image.n_frames == 39
    images = load_image(data, first.width * first.height)  # the bound is of one frame
    difference = np.abs(np.asarray(images).astype(int) - np.asarray(first).astype(int))
    assert difference.mean() < (20 if kind in ("MPO", "GIF") else 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    image = load_image(buffer.getvalue(), 100)
    assert image.mode == "RGB"
    if mode in ("RGBA", "LA"):
        assert image.getpixel((0, 0)) == (255, 255, 255)  # nothing but transparency


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_image_is_named(kind: str) -> None:
    data = image_bytes(64, 64, kind=kind)
    assert load_image(data, 64 * 64).size == (64, 64)
    for length in (0, 1, 10, len(data) // 2, len(data) * 4 // 5):
        with pytest.raises(ImageError) as caught:
            load_image(data[:length], 64 * 64)
        assert caught.value.rule in ("truncated_image", "unreadable_image")


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return image + struct.pack(">I", 10**6) + b"IDAT" + bytes(100)


def test_decompression_bomb_is_refused_by_its_header() -> None:
    for max_pixels in (10**6, 10**12):  # this guard, and Pillow's own
        with pytest.raises(ImageError) as caught:
            load_image(png_header(20_000, 20_000), max_pixels)
        assert caught.value.rule == "decompression_bomb"


def test_pillow_may_warn_of_a_large_image() -> None:
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="decompression_bomb"):
        load_image(png_header(10_000, 10_000), 64_000_000)


# ------------------------------------------------------------------------------------------------------ grey of 16 bits


@pytest.mark.parametrize(
    "data",
    [
        encoded(grey16(), "PNG"),
        encoded(grey16(), "TIFF"),
        encoded(grey16(), "TIFF", compression="tiff_adobe_deflate"),
        encoded(grey16(), "PPM"),
        tiff(GREY, 16, (GREY.astype("<u2") * 257).tobytes()),
        tiff(GREY, 16, (65535 - GREY.astype("<u2") * 257).tobytes(), photometric=0),
        tiff(GREY, 12, pack12(GREY.astype(int) * 4095 // 255)),
        b"P2\n24 16\n4095\n" + " ".join(str(int(v) * 4095 // 255) for v in GREY.flatten()).encode(),
    ],
    ids=["png", "tiff", "deflate", "pgm", "tiff-by-hand", "white-is-zero", "12-bit", "maxval-4095"],
)
def test_grey_of_16_bits_is_shown_as_the_same_grey_of_8_bits(data: bytes) -> None:
    assert np.abs(shown(data) - GREY[..., None]).max() <= 1


@pytest.mark.skipif(not CASES.is_file(), reason="the folder of shared cases is not beside this checkout")
def test_unusual_modes_are_shown_right_or_refused(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("cases_inputs", CASES)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    cases.unusual_modes(tmp_path / "images")
    files = sorted((tmp_path / "images").iterdir())
    assert files
    for file in files:
        seen = shown(file.read_bytes())
        assert np.abs(seen - cases.GREY[..., None].astype(int)).max() <= 1, file.name


def test_a_uniform_image_of_16_bits_is_shown_uniform() -> None:
    for value in (0, 3000, 65535):
        data = encoded(Image.fromarray(np.full((4, 6), value, np.uint16)), "PNG")
        assert set(shown(data).flatten()) == {value >> 8}


def test_the_transparent_value_of_16_bits_is_white() -> None:
    value = int(GREY[0, 0]) * 257
    data = encoded(grey16(), "PNG", transparency=value)
    expected = np.where(GREY[0, 0] == GREY, 255, GREY)
    assert np.abs(shown(data) - expected[..., None]).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(GREY.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(GREY.astype(np.uint16) * 15), "TIFF"),  # 12 bits that nothing says are 12
        encoded(Image.fromarray(30_000 + GREY.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
        encoded(Image.fromarray(GREY.astype(np.int32) * 1000), "TIFF"),
        encoded(Image.fromarray(GREY.astype(np.float32)), "PPM"),
    ],
    ids=["8-in-16", "12-in-16", "narrow", "float", "unit-float", "32-bit", "pfm"],
)
def test_values_without_a_known_white_are_refused(data: bytes) -> None:
    assert rule_of(data) == "unknown_value_range"
    assert sample_rule(data) == "unknown_value_range"


# ------------------------------------------------------------------------------------------------- hostile and damaged


def png_with(*chunks: bytes) -> bytes:
    """A whole PNG with more chunks before its pixels."""
    data = encoded(pixels(1), "PNG")
    start = len(PNG_MAGIC) + 25
    return data[:start] + b"".join(chunks) + data[start:]


def test_text_and_profiles_that_unpack_to_much_are_refused() -> None:
    huge = zlib.compress(bytes(80_000_000), 9)
    profile = png_chunk(b"iCCP", b"name\0\0" + huge)
    text = png_chunk(b"zTXt", b"name\0\0" + huge)
    many = [png_chunk(b"zTXt", b"name%d\0\0" % k + zlib.compress(bytes(1_000_000), 9)) for k in range(80)]
    for chunks in ([profile], [text], many):
        data = png_with(*chunks)
        assert len(data) < 200_000
        assert rule_of(data) == "unreadable_image"


def test_a_warning_turned_into_an_error_is_still_a_bomb() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rule_of(png_header(10_000, 10_000), 10**12) == "decompression_bomb"


def test_half_an_image_is_refused_though_another_library_lets_it_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("JPEG", "PNG", "BMP"):
        data = image_bytes(64, 64, kind=kind)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert rule_of(data[: len(data) * 9 // 10]) == "truncated_image", kind


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, OverflowError, AssertionError])
def test_any_exception_of_a_decoder_is_counted(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error("no decoder should say this")

    data = image_bytes(8, 8)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert rule_of(data) == "truncated_image"
    monkeypatch.setattr(Image, "open", fail)
    assert rule_of(data) == "unreadable_image"


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_says_nothing_about_the_image_is_raised(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    data = image_bytes(8, 8)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(error):
        load_image(data, 10**6)


def test_pixels_of_a_sample_are_bounded_before_any_is_decoded() -> None:
    large = png_header(8_000, 8_000)  # the pixels are missing: decoding would say truncated_image
    assert sample_rule(*[large] * 4) == "truncated_image"  # the default admits four of the largest
    assert sample_rule(*[large] * 5) == "too_many_pixels"
    assert sample_rule(large, max_sample_pixels=63_999_999) == "too_many_pixels"
    assert sample_rule(large, large, max_sample_pixels=128_000_000) == "truncated_image"
    assert sample_rule(png_header(8_001, 8_000)) == "decompression_bomb"


def test_every_header_is_judged_before_any_pixel_is_decoded() -> None:
    damaged = png_header(40, 40)
    assert sample_rule(damaged, b"no image") == "unreadable_image"
    assert sample_rule(damaged, image_bytes(3, 700)) == "extreme_aspect_ratio"


def test_the_kind_is_known_by_content_and_named() -> None:
    with pytest.raises(ImageError, match=r"not one of JPEG, PNG.*it begins with b'%!PS-Adobe"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert str(ImageError("truncated_image", "why")) == "truncated_image: why"


def test_sizes_of_random_images_agree_before_and_after_decoding() -> None:
    rng = random.Random(0)
    for seed in range(40):
        size = rng.randint(1, 60), rng.randint(1, 60)
        stored = open_image(image_bytes(*size, seed=seed, kind=rng.choice(("PNG", "JPEG", "GIF", "WEBP", "BMP"))))
        assert stored.size == stored.decode().size == size
