"""Sizes, orientations and markers in headers, against Pillow and against bytes written by hand from the standards."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data_pipeline.transforms.image_headers import claimed_size, count_scans, exif_orientation, jpeg_markers
from tests.support.samples import encode, pixels

COLOUR = pixels(3, 3, 9, 9)


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """An EXIF block with other tags before and after the orientation."""
    letter = {1: "B3x", 3: "H2x", 4: "I"}[kind]
    entries = [
        struct.pack(order + "HHI4s", 0x010F, 2, 4, b"ABC\0"),
        struct.pack(order + "HHI" + letter, 0x0112, kind, 1, orientation),
        struct.pack(order + "HHIH2x", 0x0128, 3, 1, 2),
    ]
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_orientation_is_read_in_either_byte_order(order: str, kind: int) -> None:
    for orientation in range(1, 9):
        block = exif(orientation, order, kind)
        assert exif_orientation(block) == exif_orientation(block[6:]) == orientation
        assert jpeg_markers(encode(COLOUR, "JPEG", exif=block)) == (orientation, False)


def test_exif_that_says_nothing_leaves_the_image_as_it_is() -> None:
    good = exif(6)
    for block in (
        b"",
        exif(0),
        exif(9),
        exif(60000),
        b"Exif\0\0",
        good[:12],
        good[:20],
        good[:30],
        b"Exif\0\0MM",
    ):
        assert exif_orientation(block) == 1
    # A directory that begins beyond the block, or that claims 65535 entries.
    assert exif_orientation(b"MM\0*" + struct.pack(">I", 2**32 - 1)) == 1
    assert exif_orientation(b"MM\0*" + struct.pack(">IH", 8, 65535) + bytes(40)) == 1


def test_orientation_is_that_of_the_image_not_of_its_thumbnail() -> None:
    """Markers inside the EXIF block and after the first scan belong to other images."""
    thumbnail = encode(COLOUR, "JPEG", exif=exif(3), progressive=True)
    data = encode(COLOUR, "JPEG", exif=exif(6) + thumbnail)
    assert jpeg_markers(data) == (6, False)
    plain = encode(COLOUR, "JPEG")
    assert jpeg_markers(plain + thumbnail) == (1, False)
    assert jpeg_markers(thumbnail) == (3, True)
    # Fill bytes before a marker, and bytes between segments, are passed over as libjpeg does.
    assert jpeg_markers(data[:2] + b"\xff\xff\xff" + data[3:]) == (6, False)
    assert jpeg_markers(data[:2] + b"\0\1\2" + data[2:]) == (6, False)
    for length in range(len(data)):
        assert jpeg_markers(data[:length])[0] in (1, 6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (300, 2)])
def test_sizes_are_read_from_headers_as_pillow_does(kind: str, shape: tuple[int, int]) -> None:
    for image in (pixels(1, 1, *shape), np.dstack([pixels(1, 1, *shape), np.full(shape, 9, np.uint8)])):
        for options in ({}, {"lossless": True}) if kind == "WEBP" else ({},):
            data = encode(Image.fromarray(image), kind, **options)
            assert claimed_size(data) == Image.open(io.BytesIO(data)).size == shape[::-1]
            for length in range(min(30, len(data))):
                assert claimed_size(data[:length]) in (None, shape[::-1])
    assert claimed_size(b"\xff\xd8\xff") is None


def test_the_size_of_an_old_bitmap_is_read() -> None:
    """OS/2 bitmaps have a header of 12 bytes with two 16-bit numbers; Pillow reads them too."""
    rows = bytes(12) * 5  # 3 pixels of 3 bytes, padded to 12
    data = (
        b"BM" + struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, 3, 5, 1, 24) + rows
    )
    assert Image.open(io.BytesIO(data)).size == (3, 5)
    assert claimed_size(data) == (3, 5)
    largest = bytearray(data)
    largest[18:22] = b"\xff" * 4  # these numbers have no sign
    assert claimed_size(bytes(largest)) == (65535, 65535)


@pytest.mark.parametrize("size", [(-3, 5), (3, -5), (-3, -5), (2**31 - 1, -(2**31))])
def test_a_bitmap_that_is_upside_down_has_a_size(size: tuple[int, int]) -> None:
    data = bytearray(encode(COLOUR, "BMP"))
    data[18:26] = struct.pack("<ii", *size)
    assert claimed_size(bytes(data)) == (abs(size[0]), abs(size[1]))


@pytest.mark.parametrize(
    ("kind", "at", "layout", "limit"),
    [(b"VP8 ", 26, "<HH", 2**14 - 1), (b"VP8L", 21, "<I", 2**14), (b"VP8X", 24, "<HBHB", 2**24)],
)
def test_every_bit_of_a_webps_size_is_read(kind: bytes, at: int, layout: str, limit: int) -> None:
    """The layouts of RFC 9649; bits beside the size (scaling, alpha) do not count."""
    for one in [1, *(2**bit for bit in range(1, 24) if 2**bit <= limit), limit]:
        for width, height in ((one, 5), (5, one), (one, limit)):
            data = bytearray(64)
            data[:4], data[8:12], data[12:16] = b"RIFF", b"WEBP", kind
            if kind == b"VP8 ":
                numbers: tuple[int, ...] = (width | 3 << 14, height | 2 << 14)
            elif kind == b"VP8L":
                numbers = (width - 1 | height - 1 << 14 | 0b1011 << 28,)
            else:
                w, h = width - 1, height - 1
                numbers = (w & 0xFFFF, w >> 16, h & 0xFFFF, h >> 16)
            struct.pack_into(layout, data, at, *numbers)
            assert claimed_size(bytes(data)) == (width, height)
    data[12:16] = b"VP9 "
    assert claimed_size(bytes(data)) is None
    assert claimed_size(b"RIFF" + bytes(4) + b"AVI " + bytes(data[12:])) is None


def segment(marker: int, body: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


# Start-of-frame markers, ITU T.81 table B.1: C4, C8 and CC are not frames.
FRAMES = [0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF]


@pytest.mark.parametrize("frame", FRAMES)
def test_progressive_frames_are_those_of_the_standard(frame: int) -> None:
    """And the orientation is found on either side of the frame, behind segments of every kind."""
    body = struct.pack(">BHHB", 8, 9, 9, 1) + b"\1\x11\0"
    others = segment(0xE0, b"JFIF\0" + bytes(9)) + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0 Exif\0\0")
    others += segment(0xDB, b"\xff\xda" * 32) + segment(0xFE, b"\xff\xd9\xff\xc2") + segment(0xFE)
    scan = segment(0xDA, bytes(6)) + segment(0xE1, exif(3)) + segment(0xC2, body)
    progressive = frame in (0xC2, 0xC6, 0xCA, 0xCE)
    before = b"\xff\xd8" + others + segment(0xE1, exif(6)) + segment(frame, body) + scan
    after = (
        b"\xff\xd8" + others + segment(frame, body) + segment(0xE1, exif(7)) + segment(0xE1, exif(2)) + scan
    )
    assert jpeg_markers(before) == (6, progressive)
    assert jpeg_markers(after) == (7, progressive)  # of two EXIF blocks the first counts
    assert jpeg_markers(b"\xff\xd8" + others + segment(frame, body) + scan) == (1, progressive)


@pytest.mark.parametrize("alone", [0x01, 0xD0, 0xD7, 0xD8, 0xFF])
def test_markers_without_a_length_are_passed_over(alone: int) -> None:
    data = b"\xff\xd8" + bytes([0xFF, alone]) * 3 + segment(0xE1, exif(5)) + segment(0xDA)
    assert jpeg_markers(data) == (5, False)


def test_an_orientation_counts_only_as_the_standard_writes_it() -> None:
    """One number (count 1) of type BYTE, SHORT or LONG, inside the segment that has the block."""
    good = exif(6)
    at = good.index(struct.pack(">HHI", 0x0112, 3, 1))
    assert exif_orientation(good) == 6
    for kind, count in ((3, 2), (3, 0), (2, 1), (5, 1), (7, 1)):
        changed = good[:at] + struct.pack(">HHI", 0x0112, kind, count) + good[at + 8 :]
        assert exif_orientation(changed) == 1
    cut = b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + at - 2) + good  # the segment ends before the entry
    assert jpeg_markers(cut + segment(0xDA)) == (1, False)
    assert exif_orientation(good[6:8] + b"\0*" + struct.pack(">I", 20) + bytes(12) + good[14:]) == 6  # moved


@pytest.mark.parametrize("scans", [1, 3])
def test_scans_are_counted(scans: int) -> None:
    data = (
        b"\xff\xd8"
        + segment(0xC2, bytes(9))
        + (segment(0xDA, bytes(6)) + b"data\xff\0") * scans
        + b"\xff\xd9"
    )
    assert count_scans(data) == scans
