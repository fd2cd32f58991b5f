"""Image bytes to a cropped, resized uint8 array; decompression bombs are refused from the header.

JPEGs take a fast path: simplejpeg (libjpeg-turbo) decodes at a reduced scale and the compiled kernel resizes. Pillow
decodes everything else, and JPEGs that simplejpeg refuses: an image is usable if Pillow can decode it.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import ContentError
from data_pipeline.transforms.augment import Augmentation, Box, choose_crop, stored_box
from data_pipeline.transforms.image_headers import (
    claimed_size,
    count_scans,
    exif_orientation,
    jpeg_markers,
    without_unused_chunks,
)
from data_pipeline.transforms.resize import resize

if TYPE_CHECKING:
    import PIL.Image


MAX_PIXELS = 25_000_000  # default of image.max_pixels
# Formats common on the web. Not EPS: Pillow would start Ghostscript for it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Encoders write about ten scans. Each costs a pass over the whole image: thousands would block a worker for minutes.
MAX_SCANS = 100


@dataclass(frozen=True)
class ImageSpec:
    """Size and augmentation of images. Mean and standard deviation are applied later, on the device.

    size: height and width of the result in pixels
    crop: range of the crop's area as a share of the image; (1, 1): the largest centred square, no random crop
    flip: mirror half of the images
    max_pixels: images with more pixels, according to their header, are unusable
    """

    size: int = 224
    crop: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    max_pixels: int = MAX_PIXELS


@dataclass(slots=True)
class _CroppedPixels:
    """Decoded pixels around the crop, before the EXIF orientation is applied.

    inner: the crop as (left, top, right, bottom) in `pixels`
    crop: the crop in the upright image at full scale
    """

    pixels: np.ndarray | PIL.Image.Image
    inner: tuple[float, float, float, float]
    orientation: int
    crop: Box


def decode_image(
    data: bytes, spec: ImageSpec, augmentation: Augmentation | None, out: np.ndarray
) -> tuple[int, ...]:
    """Decode, crop, resize (bicubic, antialiased) and flip one image into `out`, uint8 [size, size, 3].

    Returns the crop as (x, y, width, height, mirrored) in pixels of the upright image, after EXIF orientation. Without
    `augmentation` (evaluation) the crop is the largest centred square. Colour is RGB as stored: colour profiles are
    ignored, grey is repeated, transparency is composited on white. Of an animation the first frame is used. Raises
    ContentError: `undecodable` or `too many pixels`.
    """
    image, transpositions = _pillow()
    cropped = (
        _decode_jpeg(data, spec, augmentation) if data[:2] == b"\xff\xd8" else None
    ) or _decode_with_pillow(data, spec, augmentation)
    mirrored = augmentation is not None and spec.flip and augmentation.mirror
    upright = cropped.orientation not in transpositions
    stored = cropped.pixels
    if isinstance(stored, np.ndarray):
        if upright and resize(stored, cropped.inner, out, mirrored):
            return (*cropped.crop, int(mirrored))
        stored = image.fromarray(np.ascontiguousarray(stored))
    # Rows, then columns, like the kernel. In one call, Pillow 13 and later choose the order by shape.
    left, top, right, bottom = cropped.inner
    small = stored.resize(
        (spec.size, stored.height), image.Resampling.BICUBIC, (left, 0, right, stored.height)
    )
    small = small.resize((spec.size, spec.size), image.Resampling.BICUBIC, (0, top, spec.size, bottom))
    if not upright:
        small = small.transpose(transpositions[cropped.orientation])
    if mirrored:
        small = small.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    out[...] = np.asarray(small)
    return (*cropped.crop, int(mirrored))


def decoder_versions() -> dict[str, str]:
    """Versions of the decoders and their libraries, by name; other versions may give other pixels."""
    from PIL import Image, features

    versions = {"pillow": Image.__version__}
    for name in ("libjpeg_turbo", "jpg", "webp", "zlib"):
        version = features.version(name)
        if version:
            versions[f"pillow.{name}"] = str(version)
    simplejpeg = _simplejpeg()
    versions["simplejpeg"] = simplejpeg.__version__ if simplejpeg else "absent"
    return versions


@cache
def _pillow() -> tuple[Any, dict[int, Any]]:
    """The module PIL.Image, and the transposition that turns a stored image upright, by EXIF orientation."""
    from PIL import Image

    # Pillow's own pixel limit is far above max_pixels, which is checked first.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    turn = Image.Transpose
    return Image, {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _check_pixels(width: int, height: int, spec: ImageSpec) -> None:
    if width * height > spec.max_pixels:
        raise ContentError("too many pixels", f"{width} x {height}; image.max_pixels is {spec.max_pixels}")


def _crop_boxes(
    width: int, height: int, orientation: int, spec: ImageSpec, augmentation: Augmentation | None
) -> tuple[Box, Box]:
    """The crop in upright coordinates, and the same box in the stored image, whose width and height are given."""
    upright = (height, width) if orientation >= 5 else (width, height)
    crop = choose_crop(*upright, spec.crop, augmentation.crop if augmentation else None)
    return crop, stored_box(crop, *upright, orientation)


def _decode_jpeg(data: bytes, spec: ImageSpec, augmentation: Augmentation | None) -> _CroppedPixels | None:
    """Fast path for JPEGs. Returns None to use Pillow instead: no simplejpeg, CMYK, or bytes that it refuses.

    Raises ContentError.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height, spec)
    if space in ("CMYK", "YCCK"):
        return None
    orientation = _orientation(data)
    crop, (x, y, w, h) = _crop_boxes(width, height, orientation, spec, augmentation)
    eighths = _jpeg_eighths(min(w, h), spec.size)
    minimum_size = {}
    if eighths < 8:
        # The decoder uses the smallest scale with at least this size; it rounds sizes up, so these are rounded up too.
        minimum_size = {"min_width": -(-width * eighths // 8), "min_height": -(-height * eighths // 8)}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **minimum_size)
    except ValueError:
        return None
    scale = eighths / 8
    left, top, right, bottom = x * scale, y * scale, (x + w) * scale, (y + h) * scale
    # Cut whole pixels around the box before the resize, so that pixels outside of it have no influence.
    start_x, start_y = math.floor(left), math.floor(top)
    cut = pixels[start_y : math.ceil(bottom), start_x : math.ceil(right)]
    inner = (left - start_x, top - start_y, right - start_x, bottom - start_y)
    return _CroppedPixels(cut, inner, orientation, crop)


def _jpeg_eighths(side: int, size: int) -> int:
    """Scale, in eighths, at which to decode a JPEG whose crop has the shorter side `side` and becomes `size` pixels.

    The decoded crop has at least 1.5 pixels per pixel of the result: the difference from a full decode is then 43 to 48
    dB PSNR, like that between bicubic and Lanczos. Scales up to 4/8 decode no slower than a full decode and make the
    resize much cheaper; 5/8 to 7/8 decode slower (measurements in docs/log.md).
    """
    # Below 8 pixels two scales give the same size, so the size would not tell which one the decoder used.
    if side < 8:
        return 8
    eighths = math.ceil(12 * size / side)
    return eighths if eighths <= 4 else 8


def _orientation(jpeg: bytes) -> int:
    """EXIF orientation of a JPEG. Raises ContentError if it has more than MAX_SCANS scans."""
    orientation, progressive = jpeg_markers(jpeg)
    if progressive and (scans := count_scans(jpeg)) > MAX_SCANS:
        raise ContentError("undecodable", f"{scans} scans; at most {MAX_SCANS} are decoded")
    return orientation


def _decode_with_pillow(data: bytes, spec: ImageSpec, augmentation: Augmentation | None) -> _CroppedPixels:
    """Decode with Pillow: all other formats, and JPEGs that the fast path refused. Raises ContentError."""
    from PIL import Image, UnidentifiedImageError

    size = claimed_size(data)
    if size is not None:
        _check_pixels(*size, spec)
    try:
        with open_image(data) as image:
            _check_pixels(*image.size, spec)
            jpeg = _orientation(data) if image.format in ("JPEG", "MPO") else None
            rgb = as_rgb(image)
            orientation = jpeg or exif_orientation(image.info.get("exif") or b"")
    except Image.DecompressionBombError as error:
        raise ContentError("too many pixels", str(error)) from error
    except (ContentError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # Pillow's text contains a memory address, different on every run
        raise ContentError(
            "undecodable", f"not one of {', '.join(FORMATS)}; starts with {bytes(data[:12])!r}"
        ) from error
    except Exception as error:  # the bytes are complete, so any error of a decoder is about the content
        raise ContentError("undecodable", f"{type(error).__name__}: {error}") from error
    crop, (x, y, w, h) = _crop_boxes(rgb.width, rgb.height, orientation, spec, augmentation)
    return _CroppedPixels(rgb.crop((x, y, x + w, y + h)), (0, 0, w, h), orientation, crop)


def open_image(data: bytes) -> PIL.Image.Image:
    """Open one of FORMATS with Pillow. Raises whatever Pillow raises; decoding the pixels may raise more."""
    from PIL import Image

    return Image.open(io.BytesIO(without_unused_chunks(data)), formats=FORMATS)


def upright_orientation(data: bytes, image: PIL.Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an image that Pillow opened from `data`; the one that `decode_image` applies."""
    if image.format in ("JPEG", "MPO"):
        return jpeg_markers(data)[0]
    return exif_orientation(image.info.get("exif") or b"")


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file after EXIF orientation. Raises whatever Pillow raises."""
    with open_image(data) as image:
        turned = upright_orientation(data, image) >= 5
        return (image.height, image.width) if turned else image.size


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of one of FORMATS to RGB, transparency composited on white. EXIF orientation is not applied."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey keeps its upper 8 bits; Pillow's conversion clips at 255.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
