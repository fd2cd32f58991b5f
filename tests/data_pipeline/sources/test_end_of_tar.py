"""What follows a tar's end-of-archive mark: padding is accepted, anything else is a problem with its byte."""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.show import describe
from data_pipeline.sources.manifest import SourceError, open_source
from data_pipeline.sources.scan import scan
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import TarWriter, parse_sample
from tests.support.s3_server import s3_server, upload
from tests.support.tars import write_entries

BLOCK = 512
RECORD = 20 * BLOCK


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


def whole(folder: Path, samples: int = 40, size: int = 3000) -> bytes:
    path = folder / "whole" / "0.tar"
    with TarWriter(path) as tar:
        for number in range(samples):
            tar.write(f"{number:04d}", {"jpg": bytes([number + 1]) * size, "txt": b"x"})
    return path.read_bytes()


def refuse(folder: Path, data: bytes, message: str) -> None:
    """All that opens the tar at `folder` names the same problem: scan, index, show and the start of a run."""
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        scan(data, "0.tar")
    with pytest.raises(SourceError, match=message):
        open_source("a", str(folder))
    with pytest.raises(UserError, match=message):
        build_index(str(folder))
    problems = describe(str(folder))["problems"]
    assert len(problems) == 1
    assert re.search(message, problems[0])


def mark_of(data: bytes) -> int:
    """Byte of the end-of-archive mark, by the zeros at the end of a whole tar."""
    return -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK


@pytest.mark.parametrize("begin", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("length", [4096, 48 << 10])
def test_a_gap_is_found_wherever_it_lies(tmp_path: Path, begin: float, length: int) -> None:
    """As a stopped download leaves it that had reserved its size: the gap hides a header, and bytes go on behind it."""
    data = whole(tmp_path)
    start = int(begin * mark_of(data)) // 4096 * 4096
    holed = data[:start] + bytes(length) + data[start + length :]
    goes_on = start + length + len(data[start + length :]) - len(data[start + length :].lstrip(b"\0"))
    with tarfile.open(tmp_path / "whole" / "0.tar") as tar:
        lost = next(member.offset for member in tar if start <= member.offset < start + length - BLOCK)
    found = rf"other (bytes|members) begin at byte {goes_on}, after the end-of-archive mark at byte {lost}"
    refuse(tmp_path / "a", holed, found + r".*it holds \d+ complete samples")


def test_a_gap_at_the_end_is_found(tmp_path: Path) -> None:
    data = whole(tmp_path)
    start = mark_of(data) // 2 // 4096 * 4096
    refuse(tmp_path / "a", data[:start] + bytes(len(data) - start), r"zeros, more than a writer's padding")
    refuse(tmp_path / "b", bytes(64 << 10), r"its last 65536 bytes, from byte 0 on, are zeros")


def test_the_last_sample_counts_if_it_is_whole(tmp_path: Path) -> None:
    """A mark between two samples, and one between the members of a sample."""
    data = whole(tmp_path)
    for header, samples in ((b"0005.jpg", 5), (b"0005.txt", 5), (b"0001.jpg", 1)):
        start = data.index(header)
        with pytest.raises(
            UserError, match=rf"{start}.*it holds {samples} complete samples before that mark"
        ):
            scan(data[:start] + bytes(BLOCK) + data[start + BLOCK :], "0.tar")


@pytest.mark.parametrize("blocks", [1, 2, 20, 21])
def test_tars_joined_by_cat_are_found(tmp_path: Path, blocks: int) -> None:
    data = whole(tmp_path)
    first = data[: mark_of(data)] + bytes(blocks * BLOCK)
    refuse(tmp_path / "a", first + data, rf"other members begin at byte {len(first)}, .*joined by cat")


@pytest.mark.parametrize("stray", [b"x", b"<html>", bytes(700) + b"\x01", bytes(BLOCK) * 3 + b"end"])
def test_stray_bytes_are_found(tmp_path: Path, stray: bytes) -> None:
    data = whole(tmp_path)
    place = len(data) + len(stray) - len(stray.lstrip(b"\0"))
    refuse(
        tmp_path / "a", data + stray, rf"other bytes begin at byte {place}, .*it holds 40 complete samples"
    )


@pytest.mark.parametrize("record", [1, 2, 20, 64, 126, 256, 2048])
def test_padding_of_every_blocking_factor_is_accepted(tmp_path: Path, record: int) -> None:
    """GNU tar's own padding: `tar -b N`."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_bytes(b"x" * 700 * number)
    (tmp_path / "a").mkdir()
    target = tmp_path / "a" / "0.tar"
    subprocess.run(
        ["tar", "-b", str(record), "-cf", target, "-C", tmp_path / "in", "0.txt", "1.txt", "2.txt"],
        check=True,
    )
    assert target.stat().st_size % (record * BLOCK) == 0
    assert open_source("a", str(tmp_path / "a")).samples == 3


@pytest.mark.parametrize("tail", [BLOCK, BLOCK + 7, 2 * BLOCK, RECORD, RECORD + BLOCK])
def test_short_padding_is_accepted(tmp_path: Path, tail: int) -> None:
    data = whole(tmp_path)
    assert scan(data[: mark_of(data)] + bytes(tail), "0.tar").samples == 40
    with pytest.raises(UserError, match="more than a writer's padding"):
        scan(data[: mark_of(data)] + bytes(RECORD + 3 * BLOCK), "0.tar")


def test_zeros_after_a_long_name_are_damage(tmp_path: Path) -> None:
    path = write_entries(tmp_path / "0.tar", [("a.txt", tarfile.REGTYPE, 3), ("n" * 200, tarfile.REGTYPE, 3)])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    data = path.read_bytes()[: last.offset_data - BLOCK] + bytes(3 * BLOCK)
    with pytest.raises(
        UserError, match=rf"zeros at byte {last.offset_data - BLOCK}, where a member should begin"
    ):
        scan(data, "0.tar")


def test_zeros_inside_a_sample_are_damage(tmp_path: Path) -> None:
    """A gap that appeared after the index was built would otherwise take a member from a sample in silence."""
    data = whole(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tar").write_bytes(data)
    build_index(str(tmp_path / "a"))
    start = data.index(b"0003.txt")  # the header of the second member of sample 3
    (tmp_path / "a" / "0.tar").write_bytes(data[:start] + bytes(2 * BLOCK) + data[start + 2 * BLOCK :])
    reader = ShardReader(open_source("a", str(tmp_path / "a")))
    assert reader.read(0, 2)[1].keys() == {"jpg", "txt"}
    with pytest.raises(UserError, match=r"0\.tar: no sample at bytes"):
        reader.read(0, 3)
    reader.close()
    with pytest.raises(UserError, match="zeros at byte"):
        parse_sample(data[: BLOCK * 7] + bytes(BLOCK), "the span")


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["gap", "joined", "stray", "zeros"])
def test_the_same_on_s3(tmp_path: Path, s3: str, kind: str) -> None:
    data = whole(tmp_path)
    start = mark_of(data) // 2 // 4096 * 4096
    bad = {
        "gap": data[:start] + bytes(8192) + data[start + 8192 :],
        "joined": data + data,
        "stray": data + b"x",
        "zeros": data[:start] + bytes(len(data) - start),
    }[kind]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tar").write_bytes(bad)
    url = upload(tmp_path / "a", f"{s3}/{kind}")
    with pytest.raises(SourceError) as local:
        open_source("a", str(tmp_path / "a"))
    with pytest.raises(SourceError) as remote:
        open_source("a", url)
    assert str(remote.value).replace(url, "ROOT") == str(local.value).replace(str(tmp_path / "a"), "ROOT")
    with pytest.raises(UserError, match=r"end-of-archive mark|are zeros"):
        build_index(url)
    assert len(describe(url)["problems"]) == 1


@pytest.mark.parametrize("case", ["concat", "prealloc_hole"])
def test_the_files_that_people_met(shared: Path, case: str) -> None:
    source = str(shared / "cases/data/bytes_after_end_mark" / case)
    with pytest.raises(SourceError, match="after the end-of-archive mark at byte"):
        open_source("a", source)
    assert len(describe(source)["problems"]) == 1
