"""Random resized crop, flip and caption draw of a row, from its key alone.

The random numbers are drawn for a whole batch at once; the crop is chosen later, when the image's size is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np

from data_pipeline.hashing import Purpose, hash64

# Candidates per row; the first one that fits into the image is its crop. torchvision tries ten times too.
CROP_CANDIDATES = 10
RATIO_BITS = 24
# (16/9)^(1/2), (16/9)^(1/4), ...: multiplying a random subset of these factors gives a log-uniform ratio. exp() is not
# used: its last bit differs between C libraries and would sometimes change a crop. Square roots and products are exact
# everywhere.
RATIO_ROOTS = tuple(accumulate(repeat(0, RATIO_BITS - 1), lambda root, _: math.sqrt(root), initial=4 / 3))
# x, y, width, height in pixels.
Box = tuple[int, int, int, int]
# Area as a position in its range (0 to 1), width / height, and two integers below 2**64 for x and y.
CropCandidate = tuple[float, float, int, int]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random numbers of one row.

    crop: candidates for its crop, see `choose_crop`
    mirror: True for a horizontal flip, if the recipe asks for flips
    caption: integer below 2**64 that chooses the caption, see `captions.pick_caption`
    """

    crop: list[CropCandidate]
    mirror: bool
    caption: int


def draw_augmentations(keys: np.ndarray) -> list[Augmentation]:
    """Augmentations of the rows with these keys, uint64 [rows]; each depends on its key alone.

    The area of a candidate is uniform in [0, 1), its aspect ratio log-uniform in [3/4, 4/3).
    """
    crops = hash64(keys[:, None], Purpose.CROP, np.arange(4 * CROP_CANDIDATES, dtype=np.uint64))
    of_area, of_ratio, of_x, of_y = (crops[:, part::4] for part in range(4))
    shares = ((of_area >> np.uint64(11)) / 2.0**53).tolist()
    ratios = _log_uniform_ratios(of_ratio).tolist()
    candidates = zip(shares, ratios, of_x.tolist(), of_y.tolist(), strict=True)
    mirrors = (hash64(keys, Purpose.FLIP) & np.uint64(1)).astype(bool).tolist()
    captions = hash64(keys, Purpose.CAPTION).tolist()
    return [
        Augmentation(list(zip(*row, strict=True)), mirror, caption)
        for row, mirror, caption in zip(candidates, mirrors, captions, strict=True)
    ]


def _log_uniform_ratios(draws: np.ndarray) -> np.ndarray:
    """Aspect ratios, log-uniform in [3/4, 4/3), from the upper 24 bits of random 64-bit integers."""
    ratios = np.full(draws.shape, 0.75)
    for bit, root in enumerate(RATIO_ROOTS):
        ratios[(draws >> np.uint64(63 - bit) & np.uint64(1)).astype(bool)] *= root
    return ratios


def choose_crop(
    width: int, height: int, area: tuple[float, float], candidates: Sequence[CropCandidate] | None
) -> Box:
    """Crop of an image: torchvision's RandomResizedCrop, or the largest centred square.

    `area` is the range of the crop's area as a share of the image. The first of `candidates` that fits is used. If none
    fits, the crop is centred, with the aspect ratio limited to 3/4..4/3. Without `candidates` (evaluation), or with the
    range (1, 1), it is the square.
    """
    if candidates is None or area == (1.0, 1.0):
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side
    low, high = area
    for share, ratio, of_x, of_y in candidates:
        pixels = (low + (high - low) * share) * (width * height)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (of_x * (width - w + 1)) >> 64, (of_y * (height - h + 1)) >> 64, w, h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Box in the stored image for a box in the upright image of this width and height and an EXIF orientation."""
    x, y, w, h = box
    if orientation in (2, 3, 6, 7):
        x = width - x - w
    if orientation in (3, 4, 7, 8):
        y = height - y - h
    return (y, x, h, w) if orientation >= 5 else (x, y, w, h)
