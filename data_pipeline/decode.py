"""Image bytes to a cropped, resized uint8 array; a decompression bomb is refused by its header."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import ContentError
from data_pipeline.hashing import Purpose, hash64

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 25_000_000
# What the web serves; nothing that starts another program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# The members of a sample that are taken for its image; where it has several, the first of these.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TRIES = 10
RATIO_BITS = 24
# (16/9)^(1/2), (16/9)^(1/4), ...: products of these are log-uniform. exp() is avoided because its last bit
# differs between C libraries, and so, once in a while, would the crop; roots and products never do.
RATIO_ROOTS = tuple(accumulate(repeat(0, RATIO_BITS - 1), lambda root, _: math.sqrt(root), initial=4 / 3))
# A scaled JPEG decode leaves this many pixels per target pixel and side for the resize to average.
SCALED_MARGIN = 2.0

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes pixels; mean and deviation are applied later, on the device.

    crop: range of the crop's area as a share of the image; (1, 1) means the largest centred square, no
    random crop. max_pixels: larger images are unusable, which their header tells.
    """

    size: int = 224
    crop: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    max_pixels: int = MAX_PIXELS


def image_member(members: Iterable[str]) -> str | None:
    """The member of a sample that is the image, if it has one."""
    present = set(members)
    return next((extension for extension in IMAGE_EXTENSIONS if extension in present), None)


def decode_image(data: bytes, spec: ImageSpec, key: int, train: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """Decode, crop, resize (bicubic, antialiased) and perhaps mirror one image.

    Returns uint8 [size, size, 3] and the crop (x, y, width, height, mirrored) in pixels of the original.
    Colour is RGB: grey is repeated, transparency is laid on white, EXIF orientation is left alone. The crop
    is a function of `key` and the image's size alone. Raises ContentError: `undecodable` or `too many pixels`.
    """
    jpeg = data[:2] == b"\xff\xd8"
    found = (_decode_jpeg(data, spec, key, train) if jpeg else None) or _decode_any(data, spec, key, train)
    pixels, box, crop = found
    resized = _resize(pixels, box, spec.size)
    mirrored = int(train and spec.flip and bool(hash64(np.uint64(key), Purpose.FLIP) & np.uint64(1)))
    if mirrored:
        resized = resized[:, ::-1]
    return resized, (*crop, mirrored)


def choose_crop(width: int, height: int, spec: ImageSpec, key: int, train: bool) -> Box:
    """(x, y, width, height): the largest centred square, or in training a draw like RandomResizedCrop's.

    By our own hash: area uniform in spec.crop, aspect ratio log-uniform in 3/4..4/3, ten tries, then the
    centre.
    """
    if not train or spec.crop == (1.0, 1.0):
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side
    draws = hash64(np.uint64(key), Purpose.CROP, np.arange(4 * TRIES, dtype=np.uint64)).tolist()
    low, high = spec.crop
    for of_area, of_ratio, of_x, of_y in zip(*[iter(draws)] * 4, strict=True):
        area = (low + (high - low) * (of_area >> 11) / 2**53) * (width * height)
        ratio = _log_uniform_ratio(of_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (of_x * (width - w + 1)) >> 64, (of_y * (height - h + 1)) >> 64, w, h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def _log_uniform_ratio(draw: int) -> float:
    """A ratio in [3/4, 4/3), log-uniform, from the upper bits of a 64-bit draw."""
    ratio = 0.75
    for bit, root in enumerate(RATIO_ROOTS):
        if draw >> (63 - bit) & 1:
            ratio *= root
    return ratio


def _check_pixels(width: int, height: int, spec: ImageSpec) -> None:
    if width * height > spec.max_pixels:
        raise ContentError("too many pixels", f"{width} x {height}; image.max_pixels is {spec.max_pixels}")


Found = tuple[np.ndarray, tuple[float, float, float, float], Box]


def _decode_jpeg(data: bytes, spec: ImageSpec, key: int, train: bool) -> Found | None:
    """Fast path; None leaves it to Pillow: no simplejpeg, CMYK, or bytes that a strict decoder refuses."""
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height, spec)
    if space in ("CMYK", "YCCK"):
        return None
    x, y, w, h = crop = choose_crop(width, height, spec, key, train)
    wanted = SCALED_MARGIN * spec.size
    least = {}
    if min(w, h) >= 2 * wanted:
        least = {
            "min_width": math.ceil(width * wanted / w),
            "min_height": math.ceil(height * wanted / h),
            "min_factor": 2,
        }
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:
        return None
    # Scaling is by eighths, with a partial pixel at the far edges: 375 pixels at 1/2 become 188.
    by = round(8 * pixels.shape[1] / width) / 8
    return pixels, (x * by, y * by, (x + w) * by, (y + h) * by), crop


def _decode_any(data: bytes, spec: ImageSpec, key: int, train: bool) -> Found:
    """Pillow: every other format, odd JPEGs, and the verdict on broken ones."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size, spec)
            pixels = _as_rgb(image)
    except Image.DecompressionBombError as error:
        raise ContentError("too many pixels", str(error)) from error
    except (ContentError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own text holds an address, different on every run
        raise ContentError(
            "undecodable", f"none of {', '.join(FORMATS)}; begins with {data[:12]!r}"
        ) from error
    except Exception as error:  # whatever a decoder raises on complete bytes is a verdict on them
        raise ContentError("undecodable", f"{type(error).__name__}: {error}") from error
    x, y, w, h = crop = choose_crop(pixels.shape[1], pixels.shape[0], spec, key, train)
    return pixels, (x, y, x + w, y + h), crop


def _as_rgb(image: PIL.Image.Image) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey; Pillow's own conversion clips it at 255.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _resize(pixels: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Box of uint8 [height, width, 3] to [size, size, 3]; pixels outside the box do not bleed in."""
    from PIL import Image

    left, top = math.floor(box[0]), math.floor(box[1])
    right, bottom = math.ceil(box[2]), math.ceil(box[3])
    cut = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    inner = (box[0] - left, box[1] - top, min(box[2] - left, cut.width), min(box[3] - top, cut.height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC, box=inner))
