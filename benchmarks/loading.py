"""Reading, decoding and resizing photographs from tars: our Stream beside webdataset."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import ImageSpec, Stream, TextSpec
from data_pipeline.tar import TarWriter

SHARDS, PER_SHARD, SIDE, SIZE, BATCH = 4, 256, 512, 224, 64


def run(rounds: int) -> dict[str, Any]:
    """Samples a second of each reader; the readers take turns, so that the machine treats them alike."""
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        readers: dict[str, Callable[[str], Iterator[int]]] = {
            "dromos, in the process": lambda path: ours(path, 0),
            "dromos, 2 workers": lambda path: ours(path, 2),
            "webdataset + Pillow, in the process": lambda path: webdataset(path, 0),
            "webdataset + Pillow, 2 workers": lambda path: webdataset(path, 2),
        }
        for _ in range(rounds):
            for name, reader in readers.items():
                rows[name] = max(rows.get(name, 0.0), rate(reader(folder)))
    what = f"{SIDE} px JPEG -> {SIZE} px, caption -> tokens, batches of {BATCH}, {SHARDS * PER_SHARD} samples"
    return {"what": what, "unit": "samples/s", "rows": rows}


def rate(batches: Iterator[int]) -> float:
    """Samples a second, without the first two batches, in which workers start."""
    next(batches), next(batches)
    began, samples = time.perf_counter(), 0
    for count in batches:
        samples += count
    return samples / (time.perf_counter() - began)


def write_photos(folder: Path) -> None:
    """Shards of JPEGs with the spectrum of photographs: smooth noise at several scales."""
    from PIL import Image

    random = np.random.RandomState(0)
    for shard in range(SHARDS):
        with TarWriter(folder / f"{shard:05d}.tar") as writer:
            for index in range(PER_SHARD):
                pixels = np.zeros((SIDE, SIDE, 3))
                for cells in (4, 16, 64, 256):
                    noise = Image.fromarray(random.randint(0, 256, (cells, cells, 3), dtype=np.uint8))
                    pixels += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / cells**0.7
                image = Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8))
                data = io.BytesIO()
                image.save(data, "JPEG", quality=90)
                writer.write(
                    f"{shard:05d}{index:04d}", {"jpg": data.getvalue(), "txt": f"photograph {index}".encode()}
                )


def ours(folder: str, workers: int) -> Iterator[int]:
    """Rows of each batch of one epoch, in the exact order."""
    with stream(folder, workers) as batches:
        for _ in range(SHARDS * PER_SHARD // BATCH):
            yield len(next(batches).tokens)


@contextmanager
def stream(folder: str, workers: int) -> Iterator[Stream]:
    spec = ImageSpec(size=SIZE, crop=(0.5, 1.0))
    with Stream(folder, BATCH, image=spec, text=TextSpec("clip-bpe", 32), workers=workers) as opened:
        yield opened


def webdataset(folder: str, workers: int) -> Iterator[int]:
    """The same work as most training scripts write it: shuffle buffer, Pillow, torchvision's crop."""
    import open_clip
    import webdataset as wds
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(SIZE, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    transform = v2.Compose([crop, v2.PILToTensor()])
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=32)
    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=SHARDS, nodesplitter=wds.split_by_node, empty_check=False)
        .shuffle(512)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(BATCH)
    )
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(images)
