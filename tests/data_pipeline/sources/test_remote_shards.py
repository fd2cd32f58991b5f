"""Offsets that a node has learnt of a tar in a store: kept for one content of it alone, and never used damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.storage.object_store import version_of
from tests.support.counting_store import ROOT, Objects, counting_store
from tests.support.samples import write_packed


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Objects]:
    """Two tars with samples of other lengths under two names, and their sizes made equal."""
    with counting_store() as content:
        tars = []
        for name, length in (("a", 8), ("b", 300)):
            folder = write_packed(tmp_path / name, [6], length=length)
            tars.append((folder / "00000.tar").read_bytes())
        longest = max(map(len, tars))
        for name, tar in zip(("a.tar", "b.tar"), tars, strict=True):
            content.put(name, tar.ljust(longest, b"\0"), f'"{name}"')
        yield content


def manifest(store: Objects, key: str) -> Manifest:
    content, etag = store.objects[key]
    versions = np.array([version_of(etag)], np.uint64)
    sizes = np.array([len(content)])
    return Manifest("t", ROOT, [key], np.array([6]), sizes, "tar", "", versions=versions)


def keys(source: Manifest, folder: Path) -> list[str]:
    """Keys of all samples, by a reader without a memory of its own."""
    reader = ShardReader(source, CacheSettings(str(folder / "cache"), 10**9))
    try:
        return [reader.key(0, index) for index in range(6)]
    finally:
        reader.close()


WANT = [f"00000{index:04d}" for index in range(6)]


def offset_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("offsets-*"))


def test_offsets_belong_to_one_content_of_one_tar(store: Objects, tmp_path: Path) -> None:
    source = manifest(store, "a.tar")
    assert keys(source, tmp_path) == WANT
    asked = len(store.requests)
    assert keys(source, tmp_path) == WANT
    assert len(store.requests) == asked
    assert len(offset_files(tmp_path)) == 1
    # Another tar, then the first name with the other content and the same size: ranges of its own.
    assert keys(manifest(store, "b.tar"), tmp_path) == WANT
    store.put("a.tar", store.objects["b.tar"][0], '"later"')
    assert keys(manifest(store, "a.tar"), tmp_path) == WANT
    assert len(offset_files(tmp_path)) == 3
    sizes = np.array([source.sizes[0] + 512])
    store.put("a.tar", store.objects["b.tar"][0] + bytes(512), '"later"')
    longer = dataclasses.replace(manifest(store, "a.tar"), sizes=sizes)
    assert keys(longer, tmp_path) == WANT
    assert len(offset_files(tmp_path)) == 4


def test_damaged_offsets_are_learnt_again(store: Objects, tmp_path: Path) -> None:
    """A power failure can leave any bytes: flipped, cut, empty, grown."""
    source = manifest(store, "b.tar")
    keys(source, tmp_path)
    (path,) = offset_files(tmp_path)
    whole = path.read_bytes()
    for damaged in (
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))),
        *(whole[:length] for length in (0, 4, 8, 12, len(whole) - 1, len(whole) - 4)),
        whole + bytes(4),
        whole[:-8] + bytes(8),
    ):
        path.write_bytes(damaged)
        assert keys(source, tmp_path) == WANT
        assert path.read_bytes() == whole
