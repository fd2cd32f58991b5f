"""Reads of samples on a disk that fails: handles are opened anew, pauses are bounded, no sample is replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ReadError, UserError
from data_pipeline.index.build import build_index
from data_pipeline.transforms.text_formats import PackedFormat
from tests.support.samples import LENGTH, write_packed

COUNTS = [5, 4, 3]


@dataclass
class Disk:
    """Reads of tars as they happen; `fails` says which of them raise.

    reads: (tar, descriptor) of every read; opened: tars in the order of `os.open`; waits: seconds of every pause
    """

    fails: Callable[[str, int], OSError | None] = lambda tar, descriptor: None
    reads: list[tuple[str, int]] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    watched, read, opening = Disk(), storage.read_descriptor, os.open

    def watched_read(descriptor: int, offset: int, length: int) -> bytes:
        tar = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        watched.reads.append((tar, descriptor))
        error = watched.fails(tar, descriptor)
        if error is not None:
            raise error
        return read(descriptor, offset, length)

    def watched_open(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".tar"):
            watched.opened.append(os.path.basename(path))
        return opening(path, flags, mode)

    monkeypatch.setattr(storage, "read_descriptor", watched_read)
    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr("data_pipeline.batches.row_builder.time.sleep", watched.waits.append)
    return watched


@pytest.fixture
def builder(tmp_path: Path) -> BatchBuilder:
    source = write_packed(tmp_path / "t", COUNTS)
    build_index(str(source))
    return BatchBuilder(
        StreamSpec("text", 1, {"t": SourceSpec(str(source))}, batch=12, text=PackedFormat(LENGTH))
    )


def served(builder: BatchBuilder) -> list[int]:
    batch = builder.make(0, 0, 12)
    assert batch.skipped == {}
    return sorted(batch.tokens[:, 0].tolist())


EVERY = [shard * 1000 + index for shard, count in enumerate(COUNTS) for index in range(count)]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_stale_handle_is_opened_anew_once(builder: BatchBuilder, disk: Disk, code: int) -> None:
    """As on NFS when a server restarts: every handle that was open fails for ever, a new one works."""
    assert served(builder) == EVERY
    stale = {descriptor for _, descriptor in disk.reads}
    opened = len(disk.opened)
    assert opened == 3
    disk.reads.clear()
    # The kernel may give a new handle an old number: a number is stale until its tar is opened again.
    disk.fails = lambda tar, descriptor: (
        OSError(code, os.strerror(code)) if descriptor in stale and tar not in disk.opened[opened:] else None
    )
    assert served(builder) == EVERY
    assert sorted(disk.opened[opened:]) == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(disk.reads) == 12 + 1  # all handles are opened anew after the first failed read
    assert disk.waits == [0.1]
    builder.close()


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_failures_in_succession_are_tried_again_after_growing_pauses(
    builder: BatchBuilder, disk: Disk, failures: int
) -> None:
    """Two samples fail; the second one counts its own failures."""
    left: dict[str, int] = {"00000.tar": failures, "00002.tar": failures}

    def fails(tar: str, descriptor: int) -> OSError | None:
        left[tar] = left.get(tar, 0) - 1
        return OSError(errno.EIO, "Input/output error") if left[tar] >= 0 else None

    disk.fails = fails
    assert served(builder) == EVERY
    assert disk.waits == [0.1, 1.0, 4.0][:failures] * 2
    assert len(disk.reads) == 12 + 2 * failures
    builder.close()


def test_a_disk_that_stays_away_is_an_error_and_no_replaced_sample(builder: BatchBuilder, disk: Disk) -> None:
    disk.fails = lambda tar, descriptor: OSError(errno.EIO, "Input/output error")
    with pytest.raises(
        ReadError, match=r"source 't': .*\.tar, sample \d: not readable after 4 tries: .*replaced"
    ):
        builder.make(0, 0, 12)
    assert (len(disk.reads), disk.waits) == (4, [0.1, 1.0, 4.0])
    disk.fails = lambda tar, descriptor: None
    assert served(builder) == EVERY
    builder.close()


def test_a_changed_tar_is_no_failure_of_the_disk(builder: BatchBuilder, disk: Disk, tmp_path: Path) -> None:
    for tar in sorted((tmp_path / "t").glob("*.tar")):
        os.truncate(tar, 1000)
    with pytest.raises(UserError, match="is shorter than before"):
        builder.make(0, 0, 12)
    assert (len(disk.reads), disk.waits) == (1, [])
    builder.close()


def test_short_reads_are_read_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`os.pread` may return fewer bytes than asked for, as after 2 GiB or a signal; only no bytes are the end."""
    data = np.random.default_rng(1).bytes(1000)
    (tmp_path / "a").write_bytes(data)
    pread, asked = os.pread, []

    def short(descriptor: int, length: int, offset: int) -> bytes:
        asked.append((length, offset))
        return pread(descriptor, min(length, 90), offset)

    monkeypatch.setattr(os, "pread", short)
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        for offset, length in [(0, 1000), (10, 500), (990, 10), (900, 300), (1000, 5), (0, 90)]:
            assert storage.read_descriptor(descriptor, offset, length) == data[offset : offset + length]
    finally:
        os.close(descriptor)
    assert all(length > 0 for length, _ in asked)
    with pytest.raises(OSError, match="requested bytes 900 to 1200, received 100"):
        storage.read_range(str(tmp_path / "a"), 900, 300)
