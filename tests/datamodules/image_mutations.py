"""Small images of many formats, and damage done to them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

ADMITTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
REFUSED = ("EPS", "DDS", "BLP")  # Pillow reads them; EPS starts a program, the others raise what no list foresaw
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def pixels(seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """An image of random blocks."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = random.Random(seed).randbytes(24 * bands)
    small = Image.frombytes(mode, (6, 4), noise)
    return small.resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey16(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.asarray(pixels(seed, "L")).astype(np.uint16) * 257)


def seeds(kind: str) -> list[bytes]:
    """Whole files of a format, each with other features of it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = pixels(1), pixels(2)
    frames = {"save_all": True, "append_images": [second, pixels(3)]}
    makers: dict[str, Callable[[], list[bytes]]] = {
        "JPEG": lambda: [
            encoded(first, kind, exif=exif, icc_profile=b"profile" * 9),
            encoded(first, kind, progressive=True),
            encoded(pixels(1, "CMYK"), kind),
        ],
        "MPO": lambda: [encoded(first, kind, save_all=True, append_images=[second])],
        "PNG": lambda: [
            encoded(pixels(1, "RGBA"), kind, exif=exif, icc_profile=b"profile" * 9),
            encoded(first.quantize(8), kind, transparency=3),
            encoded(grey16(), kind),
            encoded(first, kind, **frames),
        ],
        "WEBP": lambda: [encoded(pixels(1, "RGBA"), kind, exif=exif), encoded(first, kind, **frames)],
        "GIF": lambda: [encoded(first, kind), encoded(first, kind, transparency=2, **frames)],
        "BMP": lambda: [encoded(first, kind), encoded(first.quantize(16), kind)],
        "TIFF": lambda: [
            encoded(first, kind, exif=exif),
            encoded(grey16(), kind, compression="tiff_adobe_deflate"),
            encoded(pixels(1, "CMYK"), kind, compression="tiff_lzw"),
            encoded(first, kind, compression="jpeg", **frames),
        ],
        "AVIF": lambda: [encoded(pixels(1, "RGBA"), kind, exif=exif, speed=10), encoded(first, kind, speed=10)],
        "PPM": lambda: [encoded(first, kind), encoded(grey16(), kind), b"P3\n3 2\n99\n" + b"7 50 99 " * 6],
        "EPS": lambda: [encoded(first, kind)],
        "DDS": lambda: [encoded(pixels(1, "RGBA"), kind), encoded(pixels(1, "RGBA"), kind, pixel_format="DXT5")],
        "BLP": lambda: [encoded(first.quantize(8), kind)],
    }
    if kind == "AVIF" and not features.check("avif"):
        return []
    return makers[kind]()


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """`data` with one to six faults. In half of the PNGs the checksums are made right again, so that the damage gets
    past them."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if not changed:
            break
        place = rng.randrange(min(len(changed), 128) if rng.random() < 0.5 else len(changed))
        length = rng.randint(1, 32)
        match rng.randrange(7):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place : place + 1] = rng.randbytes(1)
            case 2:
                number = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))
                value = number.to_bytes(4, rng.choice(("big", "little")))
                changed[place : place + 4] = value
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = changed[place : place + length]
            case 5:
                changed[place:place] = rng.randbytes(length)
            case _:
                if rng.random() < 0.3:  # rarer, since little is left
                    del changed[place:]
                else:
                    other = rng.choice(others)
                    start = rng.randrange(len(other))
                    changed[place : place + length] = other[start : start + length]
    return right_checksums(bytes(changed)) if rng.random() < 0.5 else bytes(changed)


def right_checksums(data: bytes) -> bytes:
    """A PNG with the checksum of each chunk computed again, as far as its chunks can be followed; other bytes as they
    are."""
    if not data.startswith(PNG_MAGIC):
        return data
    whole, place = PNG_MAGIC, len(PNG_MAGIC)
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        if len(body) < 4 + length:
            break
        whole += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return whole + data[place:]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
