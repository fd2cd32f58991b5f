"""Tars of photographs for the loader benchmark: copies of existing photographs under new keys, or synthetic ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from data_pipeline.sources.tar import TarWriter

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos"
# Enough samples that no epoch ends within a second, and shards for loaders that give each worker its own.
SAMPLES, SHARDS = 4000, 16
MADE, SIDE = 400, 448


def write_tars(folder: Path, source: Path | None) -> str:
    """Write SHARDS tars of SAMPLES samples (jpg and txt) into `folder`; returns a description of them.

    The photographs of `source`, or of the folder beside the project, or synthetic ones, are repeated as often as
    needed under distinct keys, which several loaders require.
    """
    source = source or (SHARED if SHARED.is_dir() else None)
    photos = list(_read(source)) if source else [_make(number) for number in range(MADE)]
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard in range(SHARDS):
        with TarWriter(folder / f"{shard:05d}.tar") as writer:
            for index in range(SAMPLES // SHARDS):
                jpg, txt = photos[number % len(photos)]
                writer.write(f"{shard:05d}{index:04d}", {"jpg": jpg, "txt": txt})
                number += 1
    size = sum(len(jpg) for jpg, _ in photos) / len(photos) / 1000
    kind = f"photographs of {source.name}" if source else f"synthetic photographs of {SIDE} pixels"
    return f"{len(photos)} {kind}, {size:.0f} KB each, repeated to {SAMPLES} samples in {SHARDS} tars"


def _read(source: Path) -> list[tuple[bytes, bytes]]:
    """The (JPEG, caption) pairs of all tars in a folder."""
    found: list[tuple[bytes, bytes]] = []
    for path in sorted(source.glob("*.tar")):
        pairs: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                if file is not None and extension in ("jpg", "jpeg", "txt"):
                    pairs.setdefault(key, {})[extension.replace("jpeg", "jpg")] = file.read()
        found += [
            (pair["jpg"], pair.get("txt", key.encode())) for key, pair in pairs.items() if "jpg" in pair
        ]
    if not found:
        raise SystemExit(f"--data {source}: no tars with jpg members there")
    return found


def _make(number: int) -> tuple[bytes, bytes]:
    """A JPEG with a photograph-like spectrum, smooth noise at several scales; and its caption."""
    from PIL import Image

    random = np.random.RandomState(number)
    pixels = np.zeros((SIDE, SIDE, 3))
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(random.randint(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / cells**0.7
    data = io.BytesIO()
    Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8)).save(data, "JPEG", quality=92)
    return data.getvalue(), f"photograph {number}".encode()
