"""Damage, seeded: bytes, images, captions and tars as disks, networks, crawls and people spoil them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np

Bytes = Callable[[np.random.Generator, bytes], bytes]


def flip_bits(random: np.random.Generator, data: bytes) -> bytes:
    """One to eight bits anywhere."""
    out = bytearray(data)
    for place in random.integers(0, 8 * len(out), random.integers(1, 9)) if out else ():
        out[place // 8] ^= 1 << (place % 8)
    return bytes(out)


def flip_early_bits(random: np.random.Generator, data: bytes) -> bytes:
    """Bits of the first 200 bytes, where headers are."""
    return flip_bits(random, data[:200]) + data[200:]


def truncate(random: np.random.Generator, data: bytes) -> bytes:
    return data[: int(random.integers(0, max(1, len(data))))]


def zero_block(random: np.random.Generator, data: bytes) -> bytes:
    """A sector that was never written."""
    start = int(random.integers(0, max(1, len(data))))
    return data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :]


def garbage(random: np.random.Generator, data: bytes) -> bytes:
    return random.bytes(int(random.integers(0, 2000)))


def insert(random: np.random.Generator, data: bytes) -> bytes:
    """Bytes too many: what follows stands elsewhere."""
    at = int(random.integers(0, len(data) + 1))
    return data[:at] + random.bytes(int(random.integers(1, 700))) + data[at:]


def repeat_part(random: np.random.Generator, data: bytes) -> bytes:
    low, high = sorted(random.integers(0, len(data) + 1, 2).tolist())
    return data[:high] + data[low:high] + data[high:]


BYTES: tuple[Bytes, ...] = (
    flip_bits, flip_early_bits, truncate, zero_block, garbage, insert, repeat_part
)  # fmt: skip


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(random: np.random.Generator, data: bytes) -> bytes:
    """A header that promises up to 2**31 pixels a side, over little data."""
    side = [int(random.integers(6000, 2**31 - 1)), int(random.integers(6000, 2**31 - 1))]
    header = struct.pack(">IIBBBBB", *side, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """64 MB of text, compressed to 64 kB. It is always the same, and takes half a second to make."""
    return b"Comment\0\0" + zlib.compress(bytes(1 << 26), 9)


def bomb_png(random: np.random.Generator, data: bytes) -> bytes:
    """The 64 MB of text before the pixels."""
    text = bomb()
    return data[:33] + png_chunk(b"zTXt", text) + data[33:] if data[:4] == b"\x89PNG" else text


def huge_jpeg(random: np.random.Generator, data: bytes) -> bytes:
    """The frame header says 65535 x 65535."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + b"\xff\xff\xff\xff" + data[at + 9 :] if at >= 0 else data[:2]


IMAGES: tuple[Bytes, ...] = (*BYTES, huge_png, bomb_png, huge_jpeg)


def bad_caption(random: np.random.Generator, data: bytes) -> bytes:
    """Not UTF-8, blank, controls, an end token spelt out, or 100 kB."""
    choices = (
        b"",
        b" \n\t",
        b"\xff\xfe\x00a",
        b"\x00\x01\x1b[31mred",
        b"<|end|> <|pad|>",
        b"a dot " * 17_000,
    )
    return choices[int(random.integers(0, len(choices)))]


def bad_json(random: np.random.Generator, data: bytes) -> bytes:
    choices = (
        b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"caption": 5}', b'{"caption": {"a": 1}}',
        b'{"caption": ["", null, 7]}', b'{"caption": "\\ud800"}', b"\xff{}", b'{"label": 1e999}',
    )  # fmt: skip
    return choices[int(random.integers(0, len(choices)))]


Tar = Callable[[np.random.Generator, bytes], bytes]


def members_of(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info, (tar.extractfile(info) or io.BytesIO()).read()) for info in tar]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind, errors="surrogateescape") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def swap_members(random: np.random.Generator, data: bytes) -> bytes:
    """Two members change places: samples are split, or lose their image to another."""
    found = members_of(data)
    a, b = random.integers(0, len(found), 2)
    found[a], found[b] = found[b], found[a]
    return tar_of(found)


def drop_member(random: np.random.Generator, data: bytes) -> bytes:
    found = members_of(data)
    del found[int(random.integers(0, len(found)))]
    return tar_of(found)


def add_hostile(random: np.random.Generator, data: bytes) -> bytes:
    """Links, devices, paths that lead out of the folder, names that no file system takes."""
    found = members_of(data)
    hostile = (
        member("../../escape.png", b"out"),
        member("/etc/escape.png", b"out"),
        member("a/../../b.png", b"out"),
        member("link.png", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("hard.png", kind=tarfile.LNKTYPE, link="../../x"),
        member("fifo.png", kind=tarfile.FIFOTYPE),
        member("device.png", kind=tarfile.CHRTYPE),
        member("x" * 5000 + ".png", b"long"),
        member("\udcff\udcfe.png", b"not utf-8"),
        member("new\nline.txt", b"a dot"),
        member(".hidden", b"x"),
        member("folder/", kind=tarfile.DIRTYPE),
        member("__meta__/x.json", b"{}"),
    )
    for _ in range(int(random.integers(1, 4))):
        found.insert(int(random.integers(0, len(found) + 1)), hostile[int(random.integers(0, len(hostile)))])
    return tar_of(found, (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[int(random.integers(0, 2))])


def header_field(random: np.random.Generator, data: bytes) -> bytes:
    """A member's size field says something else, under a right checksum."""
    out = bytearray(data)
    headers = [info.offset for info, _ in members_of(data)]
    at = headers[int(random.integers(0, len(headers)))]
    fields = (
        b"77777777777\0",
        b"00000000000\0",
        b"\x80" + b"\xff" * 11,
        b"-0000000001\0",
        b"9999999999\0 ",
        b" " * 12,
    )
    out[at + 124 : at + 136] = fields[int(random.integers(0, len(fields)))]
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % (sum(out[at : at + 512]) % 8**6)
    return bytes(out)


def compress(random: np.random.Generator, data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, mtime=0)


def append_another(random: np.random.Generator, data: bytes) -> bytes:
    """`cat a.tar b.tar`: readers stop at the first end-of-archive mark."""
    return data + data


TARS: tuple[Tar, ...] = (
    *BYTES, swap_members, drop_member, add_hostile, header_field, compress, append_another
)  # fmt: skip


def bad_stats(random: np.random.Generator, data: bytes) -> bytes:
    stats = json.loads(data)
    values = (-1, 10**9, 0, "3", None, 1.5, True, [], stats["successes"] + 1)
    choice = int(random.integers(0, len(values) + 3))
    if choice < len(values):
        return json.dumps(stats | {"successes": values[choice]}).encode()
    return (b"", b"[]", b"{")[choice - len(values)]
