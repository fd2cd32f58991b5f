"""Tars of every header kind, also beyond 8 GiB as sparse files: members, scans and offsets are those of tarfile."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.scan import scan, scan_file
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import parse_sample
from data_pipeline.sources.tar_members import BufferedTar, Member, _number, iter_members

BLOCK = 512
GIB = 1 << 30
# (header blocks, content that is written, bytes that the content takes in the tar)
Part = tuple[bytes, bytes, int]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, size_field: bytes | None = None) -> bytes:
    """One ustar header; `size_field` replaces the 12 bytes of the size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = (size if size_field is None else 0), kind
    if kind == tarfile.SYMTYPE:
        info.linkname = "elsewhere"
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size_field is not None:
        raw[124:136] = size_field
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header with its records; `LENGTH key=value\\n`, where LENGTH counts itself."""
    body = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return header("pax", len(body), kind) + padded(body)


def long_name(name: str, kind: bytes = tarfile.GNUTYPE_LONGNAME) -> bytes:
    raw = name.encode() + b"\0"
    return header("././@LongLink", len(raw), kind) + padded(raw)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file(name: str, content: bytes) -> Part:
    return header(name, len(content)), content, len(content)


def write(path: Path, parts: list[Part], zero_blocks: int = 2) -> Path:
    """Write a tar; content that is shorter than its size is a hole of a sparse file."""
    with path.open("wb") as out:
        for head, content, size in parts:
            out.write(head + content)
            out.seek(-(-size // BLOCK) * BLOCK - len(content), io.SEEK_CUR)
        out.truncate(out.tell() + zero_blocks * BLOCK)
    return path


def by_tarfile(source: Path | bytes) -> list[Member]:
    """Regular files of a tar, by the standard library."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with opened, tarfile.open(fileobj=opened) as tar:
        return [
            Member(m.offset, m.name, m.offset_data, m.size, m.offset_data + -(-m.size // BLOCK) * BLOCK)
            for m in tar.getmembers()
            if m.isreg()
        ]


def samples_of(members: list[Member]) -> list[list[Member]]:
    """Neighbours whose names agree up to the first dot after the last slash."""

    def key(member: Member) -> str:
        folder, slash, base = member.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    return [list(group) for _, group in itertools.groupby(members, key)]


SIZES = {
    "pax": lambda name, size: pax({"size": str(size)}) + header(name, 0),
    "pax beside a wrong ustar size": lambda name, size: pax({"size": str(size)}) + header(name, 7),
    "base-256": lambda name, size: header(name, 0, size_field=b"\x80" + size.to_bytes(11, "big")),
    "twelve octal digits": lambda name, size: header(name, 0, size_field=b"%012o" % size),
    "GNU long name": lambda name, size: (
        long_name("d/" * 60 + name) + header("cut", 0, size_field=b"\x80" + size.to_bytes(11, "big"))
    ),
    "pax path and size": lambda name, size: (
        pax({"path": f"größe/{name}", "size": str(size)}) + header("cut", 0)
    ),
    "pax size, then a GNU long name": lambda name, size: (
        pax({"size": str(size)}) + long_name("e/" * 60 + name) + header("cut", 0)
    ),
    "global header": lambda name, size: (
        pax({"comment": "x" * 600}, tarfile.XGLTYPE) + pax({"size": str(size)}) + header(name, 0)
    ),
}


@pytest.mark.parametrize("size", [2 * GIB + 1, 8 * GIB, 9 * GIB + 511])
@pytest.mark.parametrize("kind", SIZES)
def test_members_and_offsets_beyond_8_gib(tmp_path: Path, kind: str, size: int) -> None:
    """A large member first, in the middle and last in its sample; samples of a few bytes after it are read whole."""
    parts: list[Part] = [file("a.jpg", b"A" * 700), file("a.txt", b"")]
    for number in range(2):
        parts += [
            file(f"{number}b.cls", b"7"),
            (SIZES[kind](f"{number}c.mp4", size), b"", size),
            file(f"{number}d.jpg", bytes([65 + number]) * 513),
            file(f"{number}d.json", b"{}"),
        ]
    path = write(tmp_path / "0.tar", parts, zero_blocks=20)
    want = by_tarfile(path)
    assert max(member.size for member in want) == size
    with path.open("rb") as opened:
        tar = BufferedTar(lambda at, n: (opened.seek(at), opened.read(n))[1], path.stat().st_size, 9000, 700)
        assert list(iter_members(tar, "a.tar")) == want

    samples = samples_of(want)
    starts = [members[0].first for members in samples]
    end = want[-1].offset + BLOCK  # of a json of two bytes
    assert scan_file(str(path)).starts.tolist() == [*starts, end]
    assert end > 2 * size

    check_reader(tmp_path, samples, end)  # by a scan
    build_index(str(tmp_path))
    check_reader(tmp_path, samples, end)


def check_reader(root: Path, samples: list[list[Member]], end: int) -> None:
    """Check the byte range of every sample, and the content of the small ones before and behind the large members."""
    reader = ShardReader(open_source("a", str(root)))
    assert reader.manifest.counts.tolist() == [len(samples)]
    assert reader.read(0, 0) == ("a", {"jpg": b"A" * 700, "txt": b""})
    bounds = [*(members[0].first for members in samples), end]
    numbers = np.arange(len(samples))
    low, high = reader.offsets.ranges(np.zeros_like(numbers), numbers)
    assert [*low.tolist(), int(high[-1])] == bounds
    assert high.tolist() == bounds[1:]
    assert [reader.offsets.range(0, number) for number in numbers] == list(itertools.pairwise(bounds))
    for number in range(2):
        place = next(i for i, members in enumerate(samples) if members[0].name == f"{number}d.jpg")
        assert reader.read(0, place) == (f"{number}d", {"jpg": bytes([65 + number]) * 513, "json": b"{}"})
    reader.close()


def extras(chance: random.Random) -> Iterator[bytes]:
    """Headers that may stand before a member and belong to no sample."""
    if chance.random() < 0.2:
        yield pax({"comment": "c" * chance.choice([1, 600]), "mtime": "1.5"}, tarfile.XGLTYPE)
    if chance.random() < 0.1:
        yield header(f"folder{chance.random()}", 0, tarfile.DIRTYPE)
    if chance.random() < 0.1:
        yield header("link.jpg", 0, tarfile.SYMTYPE)
    if chance.random() < 0.05:
        yield long_name("k" * 130, tarfile.GNUTYPE_LONGLINK) + header("l.jpg", 0, tarfile.SYMTYPE)


def member(chance: random.Random, name: str) -> bytes:
    size = chance.choice([0, 0, 1, 511, 512, 513, 1500])
    content = padded(chance.randbytes(size))
    deep = f"{'n' * 60}/{'m' * 90}/{name}"
    return content.join(
        chance.choice(
            [
                (header(name, size), b""),
                (header(name, 0, size_field=b"\x80" + size.to_bytes(11, "big")), b""),
                (header(name, 0, size_field=b"%11o " % size), b""),
                (header(name, size, tarfile.AREGTYPE), b""),
                (header(name, size, tarfile.CONTTYPE), b""),
                (long_name(deep) + header("cut", size), b""),
                (pax({"size": str(size), "path": deep}) + header("cut", chance.randrange(9)), b""),
                (pax({"path": name}, tarfile.SOLARIS_XHDTYPE) + header("cut", size), b""),
                (pax({"mtime": "2.5"}) + pax({"path": deep}) + header("cut", size), b""),
                (pax({"path": deep}) + pax({"mtime": "2.5"}) + header("cut", size), b""),
                (pax({"size": str(size)}) + long_name(deep) + header("cut", 3), b""),
                (pax({"path": deep}) + header(f"x{'/' * chance.randrange(2)}", size), b""),
            ]
        )
    )


def test_random_headers_are_read_as_tarfile_reads_them() -> None:
    """Every mixture of header kinds, in memory; spans between two samples parse to the sample alone."""
    chance = random.Random(7)
    for _ in range(80):
        blocks = []
        for number in range(chance.randrange(1, 6)):
            for extension in ("jpg", "txt")[: chance.randrange(1, 3)]:
                blocks += [*extras(chance), member(chance, f"{number}.{extension}")]
        data = b"".join(blocks) + bytes(BLOCK * chance.choice([2, 3, 21]))
        want = by_tarfile(data)
        assert [m[1:] for m in iter_members(data, "a.tar")] == [m[1:] for m in want]
        starts = scan(data, "a.tar").starts.tolist()
        samples = samples_of(want)
        assert starts[:-1] == [mine[0].first for mine in samples]
        for mine, start, stop in zip(samples, starts, starts[1:], strict=False):
            parsed = parse_sample(data[start:stop], "the span").members.values()
            assert [(start + at, size) for at, size in parsed] == [(m.offset, m.size) for m in mine]


@pytest.mark.parametrize("key", ["path", "size"])
@pytest.mark.parametrize("place", ["first", "between", "inside"])
def test_a_global_header_that_renames_or_resizes_all_members_is_refused(key: str, place: str) -> None:
    """tarfile applies it to every member that follows; read without it, names and sizes would be others."""
    wrong = pax({key: "7"}, tarfile.XGLTYPE)
    blocks = [header("a.txt", 3) + padded(b"abc"), header("b.txt", 3) + padded(b"abc")]
    if place == "inside":
        blocks[1] = pax({"mtime": "1"}) + wrong + blocks[1]
    else:
        blocks.insert(("first", "between").index(place), wrong)
    with pytest.raises(UserError, match=rf"a\.tar: a global pax header sets {key}.*write the tar"):
        list(iter_members(b"".join(blocks) + bytes(1024), "a.tar"))


def test_a_scan_counts_members_and_samples_without_an_image() -> None:
    headers = [header(name, 0) for name in ("a.jpg", "a.txt", "b.txt", "c.png")]
    found = scan(b"".join(headers) + bytes(2 * BLOCK), "t.tar")
    assert (found.samples, found.members, found.imageless) == (3, {"jpg": 1, "txt": 2, "png": 1}, 1)
    empty = scan(bytes(2 * BLOCK), "t.tar")
    assert (empty.samples, empty.members, empty.imageless) == (0, {}, 0)


def test_a_buffered_tar_returns_the_bytes_of_the_tar() -> None:
    """Random slices, forwards and backwards, beyond both buffer sizes and the end."""
    chance = random.Random(3)
    data = chance.randbytes(5000)
    for _ in range(60):
        tar = BufferedTar(
            lambda at, n: data[at : at + n], len(data), chance.randrange(1, 900), chance.randrange(1, 900)
        )
        assert len(tar) == len(data)
        for _ in range(30):
            start = chance.randrange(len(data))
            stop = start + chance.randrange(1, 1200)
            assert tar[start:stop] == data[start:stop]


@pytest.mark.parametrize("number", [0, 1, 8**11, 2**63, 2**88, 2**95 - 1])
def test_a_number_in_base_256_has_all_bits_but_the_first(number: int) -> None:
    field = (number | 1 << 95).to_bytes(12, "big")
    assert _number(field, 0, "a.tar") == number


@pytest.mark.parametrize(
    ("field", "number"),
    [(b"0000644\0", 0o644), (b"   644 \0", 0o644), (b"644\0trash", 0o644), (b"\0" * 8, 0), (b"       7", 7)],
)
def test_an_octal_number_ends_at_its_first_nul(field: bytes, number: int) -> None:
    assert _number(field, 0, "a.tar") == number


def signed(raw: bytes) -> bytes:
    """The header with a sum of signed bytes, as some old writers make it."""
    blank = raw[:148] + b" " * 8 + raw[156:]
    return raw[:148] + b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in blank) + raw[156:]


@pytest.mark.parametrize("name", ["blå.txt", "日本語.txt", "é" * 9 + ".txt"])
def test_signed_checksums_are_read(name: str) -> None:
    plain = header(name, 3) + padded(b"abc")
    old = signed(plain[:BLOCK]) + plain[BLOCK:]
    assert old != plain
    want = by_tarfile(plain + bytes(10240))
    assert by_tarfile(old + bytes(10240)) == want
    assert list(iter_members(old + bytes(10240), "a.tar")) == want
    wrong = bytearray(old)
    wrong[0] ^= 1
    with pytest.raises(UserError, match="wrong checksum"):
        list(iter_members(bytes(wrong) + bytes(10240), "a.tar"))


@pytest.mark.parametrize("nuls", [1, 7, 511, 512, 600])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_pax_records_that_are_padded_with_nuls_are_read(nuls: int, kind: bytes) -> None:
    """The size of the pax header counts the NULs behind the records."""
    whole = pax({"mtime": "1.5", "comment": "größe"}, kind)
    body = whole[BLOCK:].rstrip(b"\0") + bytes(nuls)
    data = header("pax", len(body), kind) + padded(body) + header("a.txt", 3) + padded(b"abc") + bytes(10240)
    (want,) = by_tarfile(data)
    (found,) = iter_members(data, "a.tar")
    assert found[1:] == want[1:]
    assert scan(data, "a.tar").samples == 1


@pytest.mark.parametrize("samples", [1, 2, 10])
@pytest.mark.parametrize("cut", ["at the end", "in a header", "in the next member"])
def test_whole_samples_before_a_cut_are_counted(samples: int, cut: str) -> None:
    data = b"".join(
        header(f"{n}.{extension}", 600) + padded(b"x" * 600)
        for n in range(samples)
        for extension in ("jpg", "txt")
    )
    rest = {
        "at the end": b"",
        "in a header": header("z.jpg", 9)[:100],
        "in the next member": header("z.jpg", 900),
    }[cut]
    with pytest.raises(UserError, match=rf"it holds {samples} complete samples before the cut"):
        scan(data + rest, "a.tar")
    if samples > 1:  # with one sample, nothing says which members a sample has
        last = 2 * BLOCK + BLOCK  # header and content of the last member
        with pytest.raises(UserError, match=rf"it holds {samples - 1} complete samples before the cut"):
            scan(data[:-last], "a.tar")


@pytest.mark.parametrize("case", ["signed_checksum"])
def test_the_headers_that_people_met(shared: Path, case: str) -> None:
    path = next((shared / "cases/data/odd_headers" / case).glob("*.tar"))
    assert scan_file(str(path)).samples == len(samples_of(by_tarfile(path))) == 10


def test_the_tar_without_an_end_that_people_met(shared: Path) -> None:
    with pytest.raises(UserError, match=r"no end-of-archive mark.*it holds 10 complete samples"):
        scan_file(str(shared / "cases/data/no_end_mark/no_end/00000.tar"))
