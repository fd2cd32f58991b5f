"""All that is random about a row, drawn for a whole batch at once from the rows' keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np

from data_pipeline.hashing import Purpose, hash64

# A crop that does not fit into its image is drawn again so many times at most.
CROP_CANDIDATES = 10
RATIO_BITS = 24
# (16/9)^(1/2), (16/9)^(1/4), ...: products of these are log-uniform. exp() is avoided because its last bit
# differs between C libraries, and so, once in a while, would the crop; roots and products never do.
RATIO_ROOTS = tuple(accumulate(repeat(0, RATIO_BITS - 1), lambda root, _: math.sqrt(root), initial=4 / 3))
Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""
CropCandidate = tuple[float, float, int, int]
"""Where in its range the crop's area lies, its width / height, and two integers below 2**64 for its place."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One row's: tries for its crop, see `crops.choose_crop`; whether it is mirrored; `caption`, below 2**64."""

    crop: list[CropCandidate]
    mirror: bool
    caption: int


def draw_augmentations(keys: np.ndarray) -> list[Augmentation]:
    """Draws of rows with these keys, uint64 [rows]; a row's depend on its key alone.

    A try's area is uniform in 0..1, its aspect ratio log-uniform in 3/4..4/3.
    """
    crops = hash64(keys[:, None], Purpose.CROP, np.arange(4 * CROP_CANDIDATES, dtype=np.uint64))
    of_area, of_ratio, of_x, of_y = (crops[:, part::4] for part in range(4))
    shares = ((of_area >> np.uint64(11)) / 2.0**53).tolist()
    ratios = _log_uniform_ratios(of_ratio).tolist()
    tries = zip(shares, ratios, of_x.tolist(), of_y.tolist(), strict=True)
    mirrors = (hash64(keys, Purpose.FLIP) & np.uint64(1)).astype(bool).tolist()
    captions = hash64(keys, Purpose.CAPTION).tolist()
    return [
        Augmentation(list(zip(*row, strict=True)), mirror, caption)
        for row, mirror, caption in zip(tries, mirrors, captions, strict=True)
    ]


def _log_uniform_ratios(draws: np.ndarray) -> np.ndarray:
    """Ratios in [3/4, 4/3), log-uniform, from the upper bits of 64-bit draws."""
    ratios = np.full(draws.shape, 0.75)
    for bit, root in enumerate(RATIO_ROOTS):
        ratios[(draws >> np.uint64(63 - bit) & np.uint64(1)).astype(bool)] *= root
    return ratios


def choose_crop(
    width: int, height: int, area: tuple[float, float], tries: Sequence[CropCandidate] | None
) -> Box:
    """(x, y, width, height): the largest centred square, or in training a draw like RandomResizedCrop's.

    `area` is the range of the crop's share of the image; the first of `tries` that fits is taken, else the centre.
    Without them, or where the range is (1, 1), it is the square.
    """
    if tries is None or area == (1.0, 1.0):
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side
    low, high = area
    for share, ratio, of_x, of_y in tries:
        pixels = (low + (high - low) * share) * (width * height)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (of_x * (width - w + 1)) >> 64, (of_y * (height - h + 1)) >> 64, w, h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Where a box of the upright image of this width and height lies in the stored one, for an EXIF orientation."""
    x, y, w, h = box
    if orientation in (2, 3, 6, 7):
        x = width - x - w
    if orientation in (3, 4, 7, 8):
        y = height - y - h
    return (y, x, h, w) if orientation >= 5 else (x, y, w, h)
