"""Small sources for the tests: images, captions and tokens that identify their sample."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import TextSpec

SIZE = 12
LENGTH = 8
WORDS = ("a", "red", "blue", "dot", "of", "number", *map(str, range(10)))
Members = dict[str, bytes]


def pixels(shard: int, index: int, height: int = 20, width: int = 24) -> np.ndarray:
    """uint8 [height, width, 3], different for every sample."""
    return np.random.default_rng([shard, index]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def members(shard: int, index: int) -> Members:
    caption = f"a {'red' if index % 2 else 'blue'} dot of number {index}"
    return {
        "png": encode(pixels(shard, index)),
        "txt": caption.encode(),
        "json": json.dumps({"label": str(index % 3)}).encode(),
    }


def write_source(
    folder: Path, counts: list[int], replace: Mapping[tuple[int, int], Members] | None = None
) -> Path:
    """Write one tar per count; `replace` gives other members to the sample (shard, index)."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        with TarWriter(folder / f"{shard:05d}.tar") as tar:
            for index in range(count):
                given = (replace or {}).get((shard, index))
                tar.write(f"{shard:05d}{index:04d}", members(shard, index) if given is None else given)
    return folder


def write_packed(
    folder: Path,
    counts: list[int],
    length: int = LENGTH,
    dtype: Any = np.uint16,
    broken: Collection[tuple[int, int]] = (),
) -> Path:
    """Write packed text; all tokens of a sample are shard * 1000 + index. The samples `broken` are no arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        with TarWriter(folder / f"{shard:05d}.tar") as tar:
            for index in range(count):
                out = io.BytesIO()
                np.save(out, np.full(length, shard * 1000 + index).astype(dtype))
                tar.write(
                    f"{shard:05d}{index:04d}",
                    {"npy": b"no array" if (shard, index) in broken else out.getvalue()},
                )
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer.json with the demo's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    specials = ["<|pad|>", "<|start|>", "<|end|>", "<|unknown|>"]
    words = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def pairs(root: Path, batch: int = 8, seed: int = 5, **sources: Path | SourceSpec) -> StreamSpec:
    """A stream of image-caption pairs with random crops and flips; the tokenizer is in `root`."""
    if not (root / "tokenizer").exists():
        write_tokenizer(root / "tokenizer")
    return StreamSpec(
        name="pairs",
        seed=seed,
        sources={k: v if isinstance(v, SourceSpec) else SourceSpec(str(v)) for k, v in sources.items()},
        batch=batch,
        image=ImageSpec(SIZE, (0.4, 1.0), True),
        text=TextSpec(str(root / "tokenizer"), LENGTH),
    )
