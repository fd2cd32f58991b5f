"""Size, EXIF orientation and scan count of an image, read from its bytes without decoding."""

from __future__ import annotations

import struct

ORIENTATION_TAG = 0x0112
PNG_MARK = b"\x89PNG\r\n\x1a\n"
# Texts and the colour profile (PNG specification, 11.3): no pixel depends on them.
UNUSED_PNG_CHUNKS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
EXIF_PREFIX = b"Exif\x00\x00"
# JPEG markers without a length field: fill, TEM, RST0 to RST7, SOI.
MARKERS_WITHOUT_LENGTH = {0xFF, 0x01, *range(0xD0, 0xD9)}
# Start-of-frame markers of progressive JPEGs, Huffman or arithmetic.
PROGRESSIVE_FRAMES = {0xC2, 0xC6, 0xCA, 0xCE}
START_OF_SCAN, APP1 = 0xDA, 0xE1


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a PNG, GIF, BMP or WebP; None for other bytes, or too few bytes.

    Read here because Pillow allocates the canvas of a WebP and reads the chunks of a PNG before it returns a size, too
    late to refuse a decompression bomb.
    """
    try:
        if data[:8] == PNG_MARK:
            return struct.unpack_from(">II", data, 16)
        if data[:3] == b"GIF":
            return struct.unpack_from("<HH", data, 6)
        if data[:2] == b"BM":
            old = struct.unpack_from("<I", data, 14)[0] == 12
            width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
            return abs(width), abs(height)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
    except struct.error:
        return None
    return None


def without_unused_chunks(data: bytes) -> bytes:
    """A PNG without its texts and colour profile; other bytes, and PNGs without such chunks, are returned unchanged.

    Pillow unpacks these chunks, and refuses the image if one of them unpacks to more than 1 MiB.
    """
    if data[:8] != PNG_MARK:
        return data
    kept: list[bytes] = []
    start, at = 0, 8
    while at + 12 <= len(data):  # length, name, content, checksum
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):  # cut off: left to the decoder
            break
        if data[at + 4 : at + 8] in UNUSED_PNG_CHUNKS:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size of the extended format, frame size of the lossy and lossless formats (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def jpeg_markers(data: bytes) -> tuple[int, bool]:
    """EXIF orientation of a JPEG, 1 to 8 (1 if it has none), and True if it is progressive."""
    orientation, progressive, at = 0, False, 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            at = data.find(b"\xff", at)
            if at < 0:
                break
            continue
        marker = data[at + 1]
        if marker in MARKERS_WITHOUT_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == START_OF_SCAN:
            break
        length = data[at + 2] << 8 | data[at + 3]
        progressive |= marker in PROGRESSIVE_FRAMES
        if marker == APP1 and not orientation and data[at + 4 : at + 10] == EXIF_PREFIX:
            orientation = exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return orientation or 1, progressive


def exif_orientation(tiff: bytes) -> int:
    """Orientation in the first directory of a TIFF header, with or without the prefix "Exif"; 1 if there is none.

    Read here because Pillow's parser is a hundred times slower and would run for every photograph.
    """
    tiff = tiff.removeprefix(EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(entries):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, start + 2 + 12 * entry)
            if tag == ORIENTATION_TAG and count == 1 and kind in (1, 3, 4):
                letter = {1: "B", 3: "H", 4: "I"}[kind]
                (value,) = struct.unpack_from(order + letter, tiff, start + 10 + 12 * entry)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def count_scans(data: bytes) -> int:
    """Number of start-of-scan markers in a JPEG, those of its thumbnail included."""
    return data.count(b"\xff\xda")
