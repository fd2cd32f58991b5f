"""Upper bound for any loader: only decode and crop, in plain processes, with all bytes in memory.

`python -m benchmarks.bare SETTINGS` prints the sum of their rates. A loader has extra costs: reading, sample order,
tokenisation, digests, collation, and handing batches to the trainer.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.transforms.resize import resize

PHOTOS = 400


def photos(tars: str) -> list[bytes]:
    """The first PHOTOS JPEGs of a folder of tars."""
    found: list[bytes] = []
    for path in sorted(Path(tars).glob("*.tar")):
        with tarfile.open(path) as tar:
            files = (tar.extractfile(member) for member in tar if member.name.endswith(".jpg"))
            found += [file.read() for file in files if file is not None]
        if len(found) >= PHOTOS:
            break
    return found[:PHOTOS]


def crop(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, with the standard library's random numbers."""
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def one(data: bytes, size: int, scale: tuple[float, float], out: np.ndarray) -> None:
    """Decode (at a reduced scale if that leaves enough pixels), crop, resize, and write to `out`."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    x, y, w, h = crop(width, height, scale)
    eighths = math.ceil(12 * size / min(w, h))
    if eighths > 4:
        eighths = max(5, math.ceil(8 * size / min(w, h)))
    if eighths <= 6:
        least = {"min_width": math.ceil(width * eighths / 8), "min_height": math.ceil(height * eighths / 8)}
        x, y, w, h = (value * eighths // 8 for value in (x, y, w, h))
    else:
        least = {}
    pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    cut = Image.fromarray(np.ascontiguousarray(pixels[y : y + h, x : x + w]))
    out[...] = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


def one_by_kernel(data: bytes, size: int, scale: tuple[float, float], out: np.ndarray) -> None:
    """The same with the loader's own resize, which decodes at full scale."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    x, y, w, h = crop(width, height, scale)
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    if not resize(pixels[y : y + h, x : x + w], (0, 0, w, h), out):
        raise RuntimeError("the kernel was not built: no compiler")


def work(
    jpegs: list[bytes], samples: int, size: int, scale: tuple[float, float], kernel: bool
) -> tuple[float, float]:
    """Samples per second and CPU milliseconds per sample, after a warm-up of 32 samples."""
    each = one_by_kernel if kernel else one
    out = np.empty((64, size, size, 3), np.uint8)
    for number in range(32):
        each(jpegs[number % len(jpegs)], size, scale, out[number % 64])
    began, used = time.perf_counter(), time.process_time()
    for number in range(samples):
        each(jpegs[number % len(jpegs)], size, scale, out[number % 64])
    return samples / (time.perf_counter() - began), 1000 * (time.process_time() - used) / samples


def main() -> None:
    settings = json.loads(sys.argv[1])
    jpegs, pipes = photos(settings["tars"]), []
    for _ in range(max(1, settings["workers"])):
        reading, writing = os.pipe()
        if os.fork() == 0:
            figures = work(
                jpegs, settings["samples"], settings["size"], settings["scale"], settings["kernel"]
            )
            os.write(writing, json.dumps(figures).encode())
            os._exit(0)
        os.close(writing)
        pipes.append(reading)
    rates, processor = zip(*(json.loads(os.read(pipe, 100)) for pipe in pipes), strict=True)
    print(json.dumps({"samples_per_second": sum(rates), "processor_ms": sum(processor) / len(processor)}))


if __name__ == "__main__":
    main()
