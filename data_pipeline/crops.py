"""Which part of an image is taken, in upright coordinates, and where that part lies in the stored pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, repeat

RATIO_BITS = 24
# (16/9)^(1/2), (16/9)^(1/4), ...: products of these are log-uniform. exp() is avoided because its last bit
# differs between C libraries, and so, once in a while, would the crop; roots and products never do.
RATIO_ROOTS = tuple(accumulate(repeat(0, RATIO_BITS - 1), lambda root, _: math.sqrt(root), initial=4 / 3))

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


def choose_crop(width: int, height: int, area: tuple[float, float], draws: Sequence[int] | None) -> Box:
    """(x, y, width, height): the largest centred square, or in training a draw like RandomResizedCrop's.

    `area` is the range of the crop's share of the image, `draws` four integers below 2**64 a try; without them, or
    where the range is (1, 1), it is the square. Area uniform, aspect ratio log-uniform in 3/4..4/3, else the centre.
    """
    if draws is None or area == (1.0, 1.0):
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side
    low, high = area
    for of_area, of_ratio, of_x, of_y in zip(*[iter(draws)] * 4, strict=True):
        pixels = (low + (high - low) * (of_area >> 11) / 2**53) * (width * height)
        ratio = _log_uniform_ratio(of_ratio)
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


def _log_uniform_ratio(draw: int) -> float:
    """A ratio in [3/4, 4/3), log-uniform, from the upper bits of a 64-bit draw."""
    ratio = 0.75
    for bit, root in enumerate(RATIO_ROOTS):
        if draw >> (63 - bit) & 1:
            ratio *= root
    return ratio
