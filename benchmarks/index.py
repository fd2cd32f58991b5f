"""Indexing against plain reading of the same tars: how close the header walk comes to the disk's speed."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.index.build import build_index
from data_pipeline.sources.tar import TarWriter

PHOTO, PHOTOS, SMALL, SMALLS, SHARDS = 110_000, 6_000, 1_500, 200_000, 8
READ = 8 << 20


def run(rounds: int) -> dict[str, Any]:
    """MB/s of each method on tars that are not in the page cache; the methods take turns."""
    ways: dict[str, Callable[[Path], None]] = {
        "plain reading": read,
        "dromos data index, in one process": index,
        "tarfile, headers alone": walk_with_tarfile,
        "webdataset, all it reads": iterate_with_webdataset,
    }
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as top:
        kinds = {"photos": (PHOTO, PHOTOS), "small samples": (SMALL, SMALLS)}
        for kind, (size, samples) in kinds.items():
            write(Path(top) / kind, size, samples)
        for _ in range(rounds):
            for kind in kinds:
                for name, way in ways.items():
                    rate = timed(Path(top) / kind, way)
                    rows[f"{kind}: {name}"] = max(rows.get(f"{kind}: {name}", 0.0), rate)
    share = rows["photos: dromos data index, in one process"] / rows["photos: plain reading"]
    rows["photos: share of plain reading"] = share
    what = f"{PHOTOS:,} photos of {PHOTO // 1000} kB and {SMALLS:,} samples of {SMALL / 1000} kB, cold page cache"
    return {"what": what, "unit": "MB/s", "rows": rows, "least": {"photos: share of plain reading": 0.8}}


def write(folder: Path, size: int, samples: int) -> None:
    """Writes tars of samples with three members each."""
    random = np.random.default_rng(0)
    noise = random.bytes(2 * size)
    for shard in range(SHARDS):
        with TarWriter(folder / f"{shard:05d}.tar") as tar:
            for index in range(samples // SHARDS):
                length = int(size * random.uniform(0.5, 1.5))
                members = {"jpg": noise[:length], "txt": b"a caption of some words", "json": b"{}" * 100}
                tar.write(f"{shard:05d}{index:05d}", members)


def timed(folder: Path, way: Callable[[Path], None]) -> float:
    """MB/s with none of the files in the page cache."""
    tars = sorted(folder.glob("*.tar"))
    for path in tars:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    way(folder)
    seconds = time.perf_counter() - began
    return sum(path.stat().st_size for path in tars) / seconds / 1e6


def read(folder: Path) -> None:
    buffer = bytearray(READ)
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def index(folder: Path) -> None:
    shutil.rmtree(folder / "_index", ignore_errors=True)
    build_index(str(folder))


def walk_with_tarfile(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            for _ in tar:
                tar.members = []  # type: ignore[assignment]


def iterate_with_webdataset(folder: Path) -> None:
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    for _ in webdataset.WebDataset(urls, shardshuffle=False):
        pass
