"""The files of a merge on a disk that accepts little at a time, loses, damages or cannot reserve."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import partial_of
from pretrain.merge import merge
from pretrain.merge.methods import blocks
from pretrain.merge.output import journal, local
from pretrain.weights import dtypes
from tests.support.merge_inputs import floats, write

SPAN = 64
SHARD = 12_000  # bytes: two files


class Killed(BaseException):
    pass


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two models whose tensors have many spans of SPAN elements, in types of 1, 2, 4 and 8 bytes."""
    for module in (blocks, dtypes, local):
        monkeypatch.setattr(module, "ELEMENTS_PER_SPAN", SPAN)
    for seed, name in enumerate("ab"):
        tensors: dict[str, np.ndarray] = {f"layer.{i}.weight": floats(9 * seed + i, 40, 31) for i in range(2)}
        tensors["half"] = floats(50 + seed, 300).astype(np.float16)
        tensors["ids"] = np.arange(200, dtype=np.int64) + seed
        tensors["mask"] = np.arange(100) % 3 == seed
        write(tmp_path / name, tensors)
    return str(tmp_path / "a"), str(tmp_path / "b")


def asked(pair: tuple[str, str], out: Path) -> dict[str, bytes]:
    merge(pair, out, beta=0.3, max_shard_size=SHARD)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def stopped(pair: tuple[str, str], out: Path, patch: pytest.MonkeyPatch, spans: int) -> Path:
    """The partial folder after a kill when `spans` spans were finished."""
    real, added = journal.Journal.add, []

    def add(self: journal.Journal, *entry: Any) -> None:
        if len(added) == spans:
            raise Killed
        added.append(entry)
        real(self, *entry)

    with patch.context() as inner:
        inner.setattr(journal.Journal, "add", add)
        with pytest.raises(Killed):
            asked(pair, out)
    return partial_of(out)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def damage_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "none": lambda path: None,
    "a byte": damage_bytes,
    "the header": lambda path: path.write_bytes(bytes(64) + path.read_bytes()[64:]),
    "cut": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "too long": lambda path: os.truncate(path, path.stat().st_size + 1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_the_disk_damaged_is_made_whole(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Only spans that are still intact count as done, and the progress begins with them."""
    want = asked(pair, tmp_path / "whole")
    assert len(weights(tmp_path / "whole")) == 2
    left = stopped(pair, tmp_path / "out", monkeypatch, 45)
    for path in weights(left):
        DAMAGES[damage](path)
    told: list[int] = []
    merge(pair, tmp_path / "out", beta=0.3, max_shard_size=SHARD, progress=told.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == want
    assert sum(told) == sum(len(want[path.name]) for path in weights(tmp_path / "out"))
    assert min(told[1:]) > 0
    if damage in ("none", "too long"):
        assert told[0] > 40 * SPAN  # bytes of the spans that were done; a mask has one byte an element


def test_a_disk_that_takes_few_bytes_at_a_time(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pwrite and pread may do less than they were asked for; what was written so is known to be done."""
    want = asked(pair, tmp_path / "whole")
    real_write, real_read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real_write(file, data[:7], at))
    monkeypatch.setattr(os, "pread", lambda file, size, at: real_read(file, min(size, 11), at))
    stopped(pair, tmp_path / "out", monkeypatch, 30)
    again: list[Any] = []
    real_add = journal.Journal.add
    monkeypatch.setattr(journal.Journal, "add", lambda *entry: (again.append(entry), real_add(*entry)))
    assert asked(pair, tmp_path / "out") == want
    assert len(again) == sum(-(-size // SPAN) for size in (40 * 31, 40 * 31, 300, 200, 100)) - 30


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOSPC, errno.EIO])
def test_space_is_reserved_before_the_work_where_the_file_system_can(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    want = asked(pair, tmp_path / "whole")
    reserved: list[tuple[int, int]] = []

    def reserve(file: int, at: int, size: int) -> None:
        reserved.append((at, size))
        assert os.fstat(file).st_size == size
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    if code in (errno.ENOSPC, errno.EIO):
        with pytest.raises(UserError, match=f"out: cannot be written: {os.strerror(code)}"):
            asked(pair, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert len(reserved) == 1
    else:
        assert asked(pair, tmp_path / "out") == want
        assert reserved == [(0, len(want[path.name])) for path in weights(tmp_path / "whole")]
