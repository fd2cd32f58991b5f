"""Image bytes to a cropped, resized uint8 array; a decompression bomb is refused by its header."""

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
from data_pipeline.transforms.image_headers import claimed_size, count_scans, exif_orientation, jpeg_markers
from data_pipeline.transforms.resize import resize

if TYPE_CHECKING:
    import PIL.Image


MAX_PIXELS = 25_000_000
# What the web serves; nothing that starts another program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Encoders write about ten; each costs a pass over the whole image, so that thousands hold a worker for minutes.
MAX_SCANS = 100


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


@dataclass(slots=True)
class _CroppedPixels:
    """Pixels as they are stored that hold the crop: `inner` (left, top, right, bottom) of them is the crop."""

    pixels: np.ndarray | PIL.Image.Image
    inner: tuple[float, float, float, float]
    orientation: int
    crop: Box


def decode_image(data: bytes, spec: ImageSpec, draw: Augmentation | None, out: np.ndarray) -> tuple[int, ...]:
    """Decode, crop, resize (bicubic, antialiased) and perhaps mirror one image, into `out`: uint8 [size, size, 3].

    Returns the crop (x, y, width, height, mirrored) in pixels of the upright image: EXIF orientation is applied.
    Colour is RGB as stored (colour profiles are not applied): grey is repeated, transparency is laid on white, an
    animation is its first frame. Without `draw` it is the centre, as in evaluation. Raises ContentError:
    `undecodable` or `too many pixels`.
    """
    image, turns = _pillow()
    cut = (_decode_jpeg(data, spec, draw) if data[:2] == b"\xff\xd8" else None) or _decode_with_pillow(
        data, spec, draw
    )
    mirrored = draw is not None and spec.flip and draw.mirror
    upright = cut.orientation not in turns
    stored = cut.pixels
    if isinstance(stored, np.ndarray):
        if upright and resize(stored, cut.inner, out, mirrored):
            return (*cut.crop, int(mirrored))
        stored = image.fromarray(np.ascontiguousarray(stored))
    # Rows, then columns, as the kernel does: Pillow itself chooses the order by shape from version 13 on.
    left, top, right, bottom = cut.inner
    small = stored.resize(
        (spec.size, stored.height), image.Resampling.BICUBIC, (left, 0, right, stored.height)
    )
    small = small.resize((spec.size, spec.size), image.Resampling.BICUBIC, (0, top, spec.size, bottom))
    if not upright:
        small = small.transpose(turns[cut.orientation])
    if mirrored:
        small = small.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    out[...] = np.asarray(small)
    return (*cut.crop, int(mirrored))


def decoder_versions() -> dict[str, str]:
    """Of the decoders and the libraries in them: another one may give other pixels."""
    from PIL import Image, features

    found = {"pillow": Image.__version__}
    for name in ("libjpeg_turbo", "jpg", "webp", "zlib"):
        version = features.version(name)
        if version:
            found[f"pillow.{name}"] = str(version)
    simplejpeg = _simplejpeg()
    found["simplejpeg"] = simplejpeg.__version__ if simplejpeg else "absent"
    return found


@cache
def _pillow() -> tuple[Any, dict[int, Any]]:
    """Pillow's module, and what turns a stored image upright, by EXIF orientation."""
    from PIL import Image

    # Its limit of pixels is far above ours, which is applied first and said in our own words.
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
    width: int, height: int, orientation: int, spec: ImageSpec, draw: Augmentation | None
) -> tuple[Box, Box]:
    """The crop in upright coordinates, and the same box in the stored image of this width and height."""
    upright = (height, width) if orientation >= 5 else (width, height)
    crop = choose_crop(*upright, spec.crop, draw.crop if draw else None)
    return crop, stored_box(crop, *upright, orientation)


def _decode_jpeg(data: bytes, spec: ImageSpec, draw: Augmentation | None) -> _CroppedPixels | None:
    """Fast path; None leaves it to Pillow: no simplejpeg, CMYK, or bytes that a strict decoder refuses."""
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
    crop, (x, y, w, h) = _crop_boxes(width, height, orientation, spec, draw)
    eighths = _jpeg_eighths(min(w, h), spec.size)
    least = {}
    if eighths < 8:
        # The decoder takes the smallest scale that leaves so many pixels; a partial one at the far edges counts.
        least = {"min_width": -(-width * eighths // 8), "min_height": -(-height * eighths // 8)}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:
        return None
    by = eighths / 8
    left, top, right, bottom = x * by, y * by, (x + w) * by, (y + h) * by
    # Whole pixels around the box, cut out before the resize, which would let pixels outside the box bleed in.
    start_x, start_y = math.floor(left), math.floor(top)
    cut = pixels[start_y : math.ceil(bottom), start_x : math.ceil(right)]
    inner = (
        left - start_x,
        top - start_y,
        min(right - start_x, cut.shape[1]),
        min(bottom - start_y, cut.shape[0]),
    )
    return _CroppedPixels(cut, inner, orientation, crop)


def _jpeg_eighths(side: int, size: int) -> int:
    """At how many eighths of its size to decode a JPEG whose crop's shorter side becomes `size`; see docs/log.md.

    Up to 4/8 a decode costs no more than a whole one and the resize much less; 1.5 pixels are left for each of the
    target's, and the result is as near to that of a whole decode as bicubic is to Lanczos, 43 to 48 dB. 5/8 to 7/8 cost
    more than a whole decode.
    """
    if (
        side < 8
    ):  # two scales would leave the same number of pixels, and which one was taken could not be told
        return 8
    eighths = math.ceil(12 * size / side)
    return eighths if eighths <= 4 else 8


def _orientation(jpeg: bytes) -> int:
    """EXIF orientation of a JPEG. Raises ContentError if it has scans beyond reason."""
    orientation, progressive = jpeg_markers(jpeg)
    if progressive and (found := count_scans(jpeg)) > MAX_SCANS:
        raise ContentError("undecodable", f"{found} scans; no more than {MAX_SCANS} are decoded")
    return orientation


def _decode_with_pillow(data: bytes, spec: ImageSpec, draw: Augmentation | None) -> _CroppedPixels:
    """Pillow: every other format, odd JPEGs, and the verdict on broken ones."""
    from PIL import Image, UnidentifiedImageError

    claimed = claimed_size(data)
    if claimed is not None:
        _check_pixels(*claimed, spec)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size, spec)
            jpeg = _orientation(data) if image.format in ("JPEG", "MPO") else None
            rgb = as_rgb(image)
            orientation = jpeg or exif_orientation(image.info.get("exif") or b"")
    except Image.DecompressionBombError as error:
        raise ContentError("too many pixels", str(error)) from error
    except (ContentError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own text holds an address, different on every run
        raise ContentError(
            "undecodable", f"none of {', '.join(FORMATS)}; begins with {bytes(data[:12])!r}"
        ) from error
    except Exception as error:  # whatever a decoder raises on complete bytes is a verdict on them
        raise ContentError("undecodable", f"{type(error).__name__}: {error}") from error
    crop, (x, y, w, h) = _crop_boxes(rgb.width, rgb.height, orientation, spec, draw)
    return _CroppedPixels(rgb.crop((x, y, x + w, y + h)), (0, 0, w, h), orientation, crop)


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any mode in RGB, its transparency on white; not turned upright."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey; Pillow's own conversion clips it at 255.
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
