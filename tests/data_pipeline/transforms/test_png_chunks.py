"""PNGs with texts and colour profiles of any size have the pixels of the same PNG without them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ContentError
from data_pipeline.show import describe
from data_pipeline.show.html import write_page
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.decode import ImageSpec, decode_image, upright_size
from data_pipeline.transforms.image_headers import without_unused_chunks
from tests.support.samples import encode, pixels

PLAIN = encode(pixels(0, 0, 64, 64))
MIB = 1 << 20
HEADER_END = 8 + 25  # the mark and IHDR


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def packed(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def text_chunk(name: bytes, size: int) -> bytes:
    """One chunk of a kind that unpacks to `size` bytes."""
    content = {
        b"tEXt": lambda: b"Comment\0" + b"x" * size,
        b"zTXt": lambda: b"Comment\0\0" + packed(size),
        b"iTXt": lambda: b"XML:com.adobe.xmp\0\1\0\0\0" + packed(size),
        b"iCCP": lambda: b"ICC Profile\0\0" + packed(size),
    }[name]()
    return chunk(name, content)


def with_chunks(png: bytes, chunks: bytes, at: int = HEADER_END) -> bytes:
    return png[:at] + chunks + png[at:]


def decoded(png: bytes, spec: ImageSpec | None = None) -> np.ndarray:
    out = np.empty((16, 16, 3), np.uint8)
    decode_image(png, spec or ImageSpec(16), None, out)
    return out


# The first is the file of Pillow #8363 and LlamaFactory #6300: a profile of 3 MB in 3 kB.
@pytest.mark.parametrize("name", [b"iCCP", b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("size", [10, 3 * MIB, 70 * MIB])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_large_chunk_has_no_influence(name: bytes, size: int, where: str) -> None:
    if where == "after" and name == b"iCCP":
        pytest.skip("a profile comes before the pixels")
    at = HEADER_END if where == "before" else len(PLAIN) - 12  # before IEND
    png = with_chunks(PLAIN, text_chunk(name, size), at)
    np.testing.assert_array_equal(decoded(png), decoded(PLAIN))
    assert upright_size(png) == (64, 64)
    assert without_unused_chunks(png) == PLAIN


def test_many_chunks_that_are_too_much_together() -> None:
    png = with_chunks(PLAIN, text_chunk(b"zTXt", MIB - 100) * 80 + text_chunk(b"iCCP", 2 * MIB))
    np.testing.assert_array_equal(decoded(png), decoded(PLAIN))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
def test_chunks_that_pixels_depend_on_are_kept(mode: str) -> None:
    from PIL import Image

    image = Image.fromarray(pixels(0, 3, 30, 40))
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    plain = encode(image, "PNG", exif=bytes_of_orientation(6), **options)
    png = with_chunks(plain, text_chunk(b"iCCP", 2 * MIB))
    np.testing.assert_array_equal(decoded(png), decoded(plain))
    assert upright_size(png) == (30, 40)


def bytes_of_orientation(orientation: int) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def test_the_pixel_limit_holds_and_damage_is_still_a_verdict() -> None:
    chunks = text_chunk(b"iCCP", 2 * MIB)
    with pytest.raises(ContentError, match="too many pixels: 64 x 64"):
        decoded(with_chunks(PLAIN, chunks), ImageSpec(16, max_pixels=64 * 64 - 1))
    for damaged in (
        with_chunks(PLAIN, chunks)[:-40],
        with_chunks(PLAIN, chunks[:-4]),
        with_chunks(PLAIN, struct.pack(">I", 1 << 31) + b"tEXt"),
        PLAIN[:40] + chunks,
    ):
        with pytest.raises(ContentError, match="undecodable"):
            decoded(damaged)


@pytest.mark.parametrize("data", [b"", PLAIN[:8], PLAIN[:20], PLAIN, b"\xff\xd8" + PLAIN, PLAIN + b"tail"])
def test_bytes_without_such_chunks_are_not_copied(data: bytes) -> None:
    assert without_unused_chunks(data) is data


def test_training_and_show_take_the_sample(tmp_path: Path) -> None:
    png = with_chunks(PLAIN, text_chunk(b"iCCP", 3 * MIB) + text_chunk(b"zTXt", 90 * MIB))
    (tmp_path / "s").mkdir()
    with TarWriter(tmp_path / "s" / "0.tar") as tar:
        for number in range(3):
            tar.write(str(number), {"png": png, "txt": b"a dot"})
    spec = StreamSpec("pairs", 0, {"s": SourceSpec(str(tmp_path / "s"))}, batch=3, image=ImageSpec(16))
    batch = BatchBuilder(spec).make(0, 0, 3)
    assert (batch.skipped, batch.bad) == ({}, [])
    assert describe(str(tmp_path / "s"))["problems"] == []
    assert write_page(str(tmp_path / "s"), str(tmp_path / "a.html"), show=3).problems == []
