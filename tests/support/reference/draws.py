"""Random choices of a row in plain integers: key, crop, mirror, caption, kept patches.

The contract is data_pipeline/hashing.py's docstrings and the golden values of its tests: a choice is the hash of
(row key, purpose, number), and the row key is the hash of (stream seed, source, shard, index, epoch, attempt).
"""

from __future__ import annotations

from fractions import Fraction
from math import sqrt

import xxhash

from tests.support.naive_order import hashed, permuted

CROP, MIRROR, IMAGE_MASK, CAPTION = 1, 2, 3, 5
REPLACE_IN_SHARD, REPLACE_IN_SOURCE = 104, 105
Box = tuple[int, int, int, int]


def name_hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())


def stream_seed(run_seed: int, stage: str, stream: str) -> int:
    return hashed(run_seed, name_hash(stage), name_hash(stream))


def row_key(seed: int, source: str, shard: int, index: int, epoch: int, attempt: int) -> int:
    return hashed(seed, name_hash(source), shard, index, epoch, attempt)


def crop_box(key: int, width: int, height: int, area: tuple[float, float]) -> Box:
    """RandomResizedCrop with ten tries (torchvision): x, y, width, height.

    If no try fits, the crop is centred, with an aspect ratio from 3/4 to 4/3.
    """
    low, high = area
    for attempt in range(10):
        of_area, of_ratio, of_x, of_y = (hashed(key, CROP, 4 * attempt + part) for part in range(4))
        pixels = (low + (high - low) * ((of_area >> 11) / 2.0**53)) * (width * height)
        ratio, factor = 0.75, 4 / 3  # 3/4 times a random subset of (16/9)^(1/2), (16/9)^(1/4), ...
        for bit in range(24):
            if of_ratio >> (63 - bit) & 1:
                ratio *= factor
            factor = sqrt(factor)
        w, h = round(sqrt(pixels * ratio)), round(sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return scaled(of_x, width - w + 1), scaled(of_y, height - h + 1), w, h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def central_square(width: int, height: int) -> Box:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def scaled(draw: int, count: int) -> int:
    """A number below `count` from a draw below 2**64."""
    return int(Fraction(draw, 2**64) * count)


def is_mirrored(key: int) -> bool:
    return hashed(key, MIRROR) % 2 == 1


def caption_number(key: int, count: int) -> int:
    return scaled(hashed(key, CAPTION), count)


def kept_patches(key: int, patches: int, ratio: float) -> list[int]:
    """The patches with the smallest noise (FLIP, section 3.1), ascending. The noise is a signed 64-bit integer."""
    if ratio == 0:
        return list(range(patches))
    noise = {patch: hashed(key, IMAGE_MASK, patch) for patch in range(patches)}
    signed = {patch: n - 2**64 if n >= 2**63 else n for patch, n in noise.items()}
    kept = max(1, int(patches * (1 - ratio)))
    return sorted(sorted(signed, key=lambda patch: signed[patch])[:kept])


def replacement(
    seed: int, source: str, counts: list[int], bad: tuple[int, int], epoch: int, attempt: int
) -> tuple[int, int]:
    """The sample of `attempt` (from 1) in place of the unusable sample `bad` (shard, index).

    The first 8 attempts visit other samples of its shard, each at most once; the others visit the whole source.
    """
    samples = [(shard, index) for shard, count in enumerate(counts) for index in range(count)]
    place, source_key = samples.index(bad), hashed(seed, name_hash(source))
    neighbours = [sample for sample in samples if sample[0] == bad[0] and sample != bad]
    if attempt <= min(8, len(neighbours)):
        key = hashed(source_key, epoch, REPLACE_IN_SHARD, place)
        return neighbours[permuted(attempt - 1, len(neighbours), key)]
    others = [sample for sample in samples if sample != bad]
    key = hashed(source_key, epoch, REPLACE_IN_SOURCE, place)
    return others[permuted(attempt % len(others), len(others), key)]
