"""Tars against Python's tarfile and the webdataset library, reading and writing; damaged tars give UserErrors."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import Sample, TarWriter, member_table, split_name
from data_pipeline.sources.tar_members import TAR_BLOCK_BYTES, iter_members

SAMPLES = {
    "000000000": {"txt": b"a red circle", "jpg": b"\xff\xd8" + bytes(700), "json": b"{}"},
    "000000001": {"txt": b"", "jpg": bytes(512), "json": b'{"a": 1}'},
    "folder/000000002": {"seg.png": b"x" * 1025, "txt": b"deep"},
    "größe/" + "n" * 140: {"txt": "ä".encode()},
}


def write(path: Path, samples: dict[str, dict[str, bytes]] = SAMPLES) -> Path:
    with TarWriter(path) as tar:
        for key, members in samples.items():
            tar.write(key, members)
    return path


def contents(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Samples according to member_table, with their content."""
    data = path.read_bytes()
    return [(s.key, {e: data[o : o + n] for e, (o, n) in s.members.items()}) for s in member_table(path)]


def by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    found = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in found]


def test_webdataset_reads_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    assert dict(by_webdataset(path)) == SAMPLES
    assert contents(path) == by_webdataset(path)


def test_tarfile_reads_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{k}.{e}" for k, s in SAMPLES.items() for e in sorted(s)]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_the_bytes_depend_on_the_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a.tar").read_bytes()
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    turned = {key: dict(reversed(members.items())) for key, members in SAMPLES.items()}
    assert write(tmp_path / "elsewhere" / "b.tar", turned).read_bytes() == first


def test_we_read_webdatasets_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for key, members in SAMPLES.items():
            tar.write({"__key__": key, **{e: m for e, m in members.items() if e != "json"}})
    assert contents(path) == by_webdataset(path)
    assert [key for key, _ in contents(path)] == list(SAMPLES)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_tarfiles(tmp_path: Path, form: int) -> None:
    """Offsets agree with tarfile's for long names, folders, links and empty files, in each of the three formats."""
    names = [
        "a.txt",
        "a.jpg",
        "d/" * 20 + "b.txt",
        "d/" + "n" * 80 + "/" + "m" * 80 + ".txt",
        "empty.txt",
        "ä/ö.png",
    ]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 180 + ".txt", "y/" * 200 + "z.tar.json"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo(f"link{number}.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "t" * 150 if form != tarfile.USTAR_FORMAT else "t"
            tar.addfile(link)
            info = tarfile.TarInfo(name)
            info.size = 0 if name.startswith("empty") else 100 * number + 1
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    with tarfile.open(path) as tar:
        truth = {m.name: (m.offset_data, m.size) for m in tar.getmembers() if m.isreg()}
    ours = {f"{s.key}.{e}": place for s in member_table(path) for e, place in s.members.items()}
    assert ours == truth
    assert len(ours) == len(names)
    assert contents(path) == by_webdataset(path)


def test_grouping_is_webdatasets(tmp_path: Path) -> None:
    names = [
        "a.txt", "a.JPG", "b.seg.png", "b.txt", "README", "b.json", "a.cls", "c.d/e.f.txt", "__meta__/x.json",
        "c.d/e.jpg", "./f.txt", "/g.txt", "/g.jpg", "h..txt", "i.",
    ]  # fmt: skip
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert contents(path) == by_webdataset(path)
    assert [s.key for s in member_table(path)] == ["a", "b", "a", "c.d/e", "./f", "/g", "h", "i"]


def test_hidden_files_are_no_samples() -> None:
    assert split_name("._a.jpg") is None
    assert split_name("dir/._a.jpg") is None
    assert split_name("dir.x/noextension") is None


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    data, whole = path.read_bytes(), member_table(path)
    last = max(offset + size for s in whole for offset, size in s.members.values())
    end = -(-last // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES  # end of the last member, where the zero blocks begin
    for cut in [*range(1, len(data), 97), *range(0, len(data), TAR_BLOCK_BYTES)]:
        if cut >= end + TAR_BLOCK_BYTES:
            assert member_table(data[:cut]) == whole
        else:
            with pytest.raises(UserError, match=r"cut off|not a tar" if cut else r"is empty \(0 bytes\)"):
                member_table(data[:cut], "x.tar")


def test_a_cut_tar_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"a\.tar is cut off.*make it again or remove it"):
        member_table(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a tar at all" * 100, "not a tar"),
        (b"\x89PNG" + bytes(2000), "not a tar|damaged"),
        (gzip.compress(bytes(random.Random(0).randbytes(4000)), mtime=0), "compressed with gzip"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.tar.*({message})"):
        member_table(path)


def test_damage_never_hangs_nor_escapes(tmp_path: Path) -> None:
    """Flipped header bytes give a table, maybe a wrong one, or a UserError; nothing else."""
    data = write(tmp_path / "a.tar").read_bytes()
    chance = random.Random(1)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            assert all(isinstance(s, Sample) for s in member_table(bytes(damaged)))
        except UserError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("size", [b"-0000000777\0", b"0x000000777\0", b"00000000 7 \0"])
def test_a_size_that_is_no_number_is_refused(size: bytes) -> None:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(UserError, match="not a tar"):
        member_table(bytes(header) + bytes(4096))


def test_pax_sizes_below_zero_do_not_loop() -> None:
    record = b"11 size=-9\n"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    file = tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(TAR_BLOCK_BYTES, b"\0") + file + bytes(1024)
    with pytest.raises(UserError, match="negative size"):
        member_table(data)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_names_of_gigabytes_are_refused_unread(kind: bytes) -> None:
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 3 << 30

    class Sparse:
        """A header, then 3 GiB that must not be read."""

        def __len__(self) -> int:
            return 4 << 30

        def __getitem__(self, part: slice, /) -> bytes:
            assert (part.start, part.stop) == (0, TAR_BLOCK_BYTES)
            return info.tobuf(tarfile.USTAR_FORMAT)

    with pytest.raises(
        UserError, match=r"a\.tar is damaged: the header at byte 0 says that a name takes 3221225472"
    ):
        list(iter_members(Sparse(), "a.tar"))


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(UserError, match=r"two members \.txt"):
        member_table(path)


@pytest.mark.parametrize("key", ["", "a.b", "folder/", "__x__/a"])
def test_keys_that_would_come_back_otherwise_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError), TarWriter(tmp_path / "a.tar") as tar:
        tar.write(key, {"txt": b""})
    assert list(tmp_path.iterdir()) == []


def test_two_neighbours_with_one_key_are_refused(tmp_path: Path) -> None:
    def twice() -> None:
        with TarWriter(tmp_path / "a.tar") as tar:
            tar.write("a", {"txt": b""})
            tar.write("a", {"jpg": b""})

    with pytest.raises(UserError, match="'a'"):
        twice()


def test_an_interrupted_writer_leaves_the_old_tar(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    before = path.read_bytes()

    def interrupted() -> None:
        with TarWriter(path) as tar:
            tar.write("b", {"txt": b"b"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
