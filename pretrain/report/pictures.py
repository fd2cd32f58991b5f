"""Images as PNG data URIs, small as they are: the page enlarges them without smoothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np


def data_uri(pixels: np.ndarray) -> str:
    """uint8 `[3 or 4, height, width]` (the fourth channel is opacity) as `data:image/png;base64,...`."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def only_patches(pixels: np.ndarray, kept: Sequence[int], patch: int) -> np.ndarray:
    """uint8 `[4, height, width]`: the image with every patch that is not in `kept` fully transparent.

    Patches are numbered row by row, as a vision transformer's convolution lays them out.
    """
    height, width = pixels.shape[1] // patch, pixels.shape[2] // patch
    seen = np.zeros(height * width, np.uint8)
    seen[list(kept)] = 255
    opacity = seen.reshape(height, width).repeat(patch, axis=0).repeat(patch, axis=1)
    return np.concatenate([np.where(opacity > 0, pixels, 0), opacity[None]]).astype(np.uint8)
