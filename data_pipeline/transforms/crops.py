"""Which part of an image is taken, in upright coordinates, and where that part lies in the stored pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""
Try = tuple[float, float, int, int]
"""Where in its range the crop's area lies, its width / height, and two integers below 2**64 for its place."""


def choose_crop(width: int, height: int, area: tuple[float, float], tries: Sequence[Try] | None) -> Box:
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
