"""Unusual images against Pillow's transforms: rotated, grey, CMYK, transparent, animated, truncated, bombs."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from data_pipeline.errors import ContentError
from data_pipeline.transforms.augment import choose_crop, draw_augmentations, stored_box
from data_pipeline.transforms.decode import ImageSpec, as_rgb, decode_image, decoder_versions
from tests.data_pipeline.transforms.test_image_headers import exif
from tests.support.samples import encode, pixels

COLOUR = pixels(3, 3, 9, 9)
SMOOTH = np.stack(
    [
        np.add.outer(np.linspace(0, 120, 301), np.linspace(0, 120, 402)),
        np.add.outer(np.linspace(90, 0, 301), np.linspace(0, 90, 402)),
        np.add.outer(np.linspace(0, 60, 301), 100 + 80 * np.sin(np.linspace(0, 12, 402))),
    ],
    axis=2,
).astype(np.uint8)


def decode(data: bytes, spec: ImageSpec, key: int | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
    out = np.empty((spec.size, spec.size, 3), np.uint8)
    draw = None if key is None else draw_augmentations(np.array([key], np.uint64))[0]
    return out, decode_image(data, spec, draw, out)


def whole(data: bytes, side: int = 9) -> np.ndarray:
    """Decode a whole square image of this side at its own size."""
    return decode(data, ImageSpec(side))[0]


def verdict(data: bytes, **options: int) -> ContentError:
    with pytest.raises(ContentError) as found:
        decode(data, ImageSpec(8, **options), 0)
    return found.value


def upright(data: bytes) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image is not None
    return image.convert("RGB")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_picture_and_crop(kind: str, orientation: int) -> None:
    image = Image.fromarray(SMOOTH)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    data = encode(image, kind, exif=exif(orientation), **options)
    true = upright(data)
    assert true.size == ((301, 402) if orientation >= 5 else (402, 301))
    spec = ImageSpec(70, (0.3, 0.9), flip=True)
    for key in range(6):
        found, (x, y, w, h, mirrored) = decode(data, spec, key)
        assert (x, y, w, h) == choose_crop(
            *true.size, spec.crop, draw_augmentations(np.array([key], np.uint64))[0].crop
        )
        want = true.crop((x, y, x + w, y + h)).resize((70, 70), Image.Resampling.BICUBIC)
        want = ImageOps.mirror(want) if mirrored else want
        error = np.abs(found.astype(int) - np.asarray(want))
        # The resize is done in the stored frame, where its two passes round in the other order.
        assert error.max() <= (4 if kind == "JPEG" else 2), error.max()
        assert error.mean() < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_of_the_upright_image_is_found_in_the_stored_one(orientation: int) -> None:
    """Cropping the stored image and then rotating gives exactly the crop of the rotated image."""
    stored = Image.fromarray(pixels(0, 5, 7, 11))
    stored.getexif()[0x0112] = orientation
    turned = ImageOps.exif_transpose(stored)
    assert turned is not None
    for box in ((0, 0, 3, 2), (2, 1, 4, 3), (turned.width - 2, turned.height - 3, 2, 3)):
        x, y, w, h = box
        a, b, c, d = stored_box(box, *turned.size, orientation)
        part = stored.crop((a, b, a + c, b + d))
        part.getexif()[0x0112] = orientation
        back = ImageOps.exif_transpose(part)
        np.testing.assert_array_equal(np.asarray(back), np.asarray(turned.crop((x, y, x + w, y + h))))


def test_grey_palette_and_one_bit_images() -> None:
    grey = COLOUR[:, :, 0]
    repeated = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(whole(encode(grey)), repeated)
    palette = Image.fromarray(COLOUR).quantize(16)
    np.testing.assert_array_equal(whole(encode(palette)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray((grey > 128).astype(np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(whole(encode(bits)), np.repeat((grey > 128)[:, :, None] * 255, 3, axis=2))
    found = whole(encode(Image.fromarray(grey), "JPEG", quality=95))
    assert (np.ptp(found, axis=2) == 0).all()
    assert np.abs(found[:, :, 0].astype(int) - grey).mean() < 5


@pytest.mark.parametrize("depth", ["grey", "colour", "colour with opacity"])
def test_sixteen_bits_keep_their_upper_eight(depth: str) -> None:
    channels, kind = {"grey": (1, 0), "colour": (3, 2), "colour with opacity": (4, 6)}[depth]
    values = np.random.default_rng(2).integers(0, 65536, (9, 9, channels)).astype(">u2")
    if channels == 4:
        values[:, :, 3] = 65535
    lines = b"".join(b"\0" + row.tobytes() for row in values)
    found = whole(png((9, 9, 16, kind), (b"IDAT", zlib.compress(lines))))
    want = (values[:, :, :3] >> 8).astype(np.uint8)
    np.testing.assert_array_equal(found, np.repeat(want, 3, axis=2) if channels == 1 else want)


def test_wide_grey_is_limited_to_sixteen_bits() -> None:
    """Pillow reads some grey images as 32-bit numbers, in which an encoder may have left more or fewer."""
    values = np.array([[-5, 0, 255, 256], [32768, 65535, 65536, 2**31 - 1]], np.int32)
    found = np.asarray(as_rgb(Image.fromarray(values)))
    np.testing.assert_array_equal(found[:, :, 0], [[0, 0, 0, 1], [128, 255, 255, 255]])
    assert (np.ptp(found, axis=2) == 0).all()
    for order in ("<", ">"):
        wide = Image.frombytes(
            f"I;16{'B' * (order == '>')}", (2, 1), np.array([513, 65535], f"{order}u2").tobytes()
        )
        np.testing.assert_array_equal(np.asarray(as_rgb(wide))[0, :, 0], [2, 255])


def test_transparency_lies_on_white() -> None:
    opacity = np.random.default_rng(1).integers(0, 256, (9, 9), dtype=np.uint8)
    share = opacity[:, :, None] / 255
    see_through = np.dstack([COLOUR, opacity])
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = whole(encode(Image.fromarray(see_through), kind, **options))
        assert np.abs(found - (COLOUR * share + 255 * (1 - share))).max() <= 1
    grey = Image.merge("LA", (Image.fromarray(COLOUR[:, :, 1]), Image.fromarray(opacity)))
    want = np.repeat(COLOUR[:, :, 1:2], 3, axis=2) * share + 255 * (1 - share)
    assert np.abs(whole(encode(grey)) - want).max() <= 1


def test_transparent_colours_of_a_palette_and_of_plain_colour_lie_on_white() -> None:
    palette = Image.fromarray(COLOUR).quantize(8)
    numbers = np.asarray(palette)
    want = np.asarray(palette.convert("RGB")).copy()
    want[numbers == 2] = 255
    np.testing.assert_array_equal(whole(encode(palette, transparency=2)), want)
    np.testing.assert_array_equal(whole(encode(palette, "GIF", transparency=2)), want)
    table = bytes([255, 128, 0, *[255] * 5])
    mixed = np.asarray(palette.convert("RGB")).astype(float)
    share = np.frombuffer(table, np.uint8)[numbers][:, :, None] / 255
    assert np.abs(whole(encode(palette, transparency=table)) - (mixed * share + 255 * (1 - share))).max() <= 1
    key = tuple(int(value) for value in COLOUR[4, 4])
    want = np.where(np.equal(COLOUR, key).all(axis=2, keepdims=True), 255, COLOUR)
    np.testing.assert_array_equal(whole(encode(Image.fromarray(COLOUR), transparency=key)), want)


@pytest.mark.parametrize("stored_as", ["CMYK", "CMYK without Adobe's marker", "YCCK"])
def test_four_inks_are_stored_inverted(stored_as: str) -> None:
    """As Adobe writes them; browsers assume it also without the marker APP14. A 2 in the marker means YCCK."""
    ramp = np.linspace(0, 255, 64)
    colour = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 128)], 2)
    inks = (255 - colour).astype(np.uint8)
    planes = np.dstack([255 - inks, np.full((64, 64), 255, np.uint8)])
    if stored_as == "YCCK":
        planes[:, :, :3] = np.asarray(Image.fromarray(inks).convert("YCbCr"))
    # Pillow inverts what it is given, and transforms nothing.
    data = encode(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=100, subsampling=0)
    marker = data.index(b"\xff\xee")
    assert data[marker + 4 : marker + 9] == b"Adobe"
    if stored_as == "YCCK":
        data = data[: marker + 15] + b"\2" + data[marker + 16 :]
        assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 2
    elif stored_as != "CMYK":
        data = data[:marker] + data[marker + 16 :]
        assert "adobe" not in Image.open(io.BytesIO(data)).info
    found = whole(data, 64)
    assert np.abs(found - colour).mean() < 2
    assert np.abs(found - colour).max() < 16


def test_a_jpeg_of_plain_rgb_is_not_taken_for_ycc() -> None:
    flat = np.full((64, 64, 3), (200, 30, 90), np.uint8)
    data = encode(Image.fromarray(flat), "JPEG", quality=100, subsampling=0, keep_rgb=True)
    assert np.abs(whole(data, 64).astype(int) - flat).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.fromarray(np.full((9, 9, 3), level, np.uint8)) for level in (10, 120, 250)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert (whole(data) == 10).all()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_progressive_and_subsampled_jpegs(progressive: bool, subsampling: int) -> None:
    data = encode(
        Image.fromarray(SMOOTH), "JPEG", quality=95, progressive=progressive, subsampling=subsampling
    )
    found, crop = decode(data, ImageSpec(240), None)
    want = upright(data).crop((crop[0], 0, crop[0] + 301, 301)).resize((240, 240), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(int) - np.asarray(want)).max() <= 1


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_was_cut_off_is_a_verdict_not_half_grey(progressive: bool) -> None:
    data = encode(Image.fromarray(SMOOTH), "JPEG", quality=90, progressive=progressive)
    decode(data, ImageSpec(200))
    for length in (*(int(len(data) * share) for share in (0.1, 0.3, 0.6, 0.9, 0.99)), len(data) - 1):
        assert verdict(data[:length]).reason == "undecodable"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_images_that_were_cut_off_are_a_verdict(kind: str) -> None:
    data = encode(pixels(0, 9, 64, 64), kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        assert verdict(data[: int(len(data) * share)]).reason == "undecodable"


def png(header: tuple[int, int, int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    width, height, depth, kind = header
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    framed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (head, *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def webp(width: int, height: int, kind: bytes) -> bytes:
    """A WebP whose header claims this size; its frame is that of a real image."""
    real = bytearray(encode(pixels(0, 0, 16, 16), "WEBP", lossless=kind == b"VP8L"))
    assert real[12:16] == kind or kind == b"VP8X"
    if kind == b"VP8 ":
        real[26:30] = struct.pack("<HH", width, height)
    elif kind == b"VP8L":
        rest = struct.unpack_from("<I", real, 21)[0] >> 28
        real[21:25] = struct.pack("<I", width - 1 | height - 1 << 14 | rest << 28)
    else:
        frame = bytes(real[12:])
        size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        body = b"VP8X" + struct.pack("<IB3x", 10, 0) + size + frame
        real = bytearray(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body)
    return bytes(real)


def gif(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.fromarray(COLOUR), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def gif_with_a_frame_beyond_its_screen(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.fromarray(COLOUR), "GIF"))
    at = data.index(b"\x2c\0\0\0\0")
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encode(COLOUR, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encode(pixels(0, 0, 16, 16), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "PNG": png((40_000, 3_000, 8, 2), (b"IDAT", zlib.compress(bytes(9999)))),
    "PNG of the largest size": png((2**31 - 1, 2**31 - 1, 8, 2), (b"IDAT", b"")),
    "WebP, lossy": webp(16_000, 16_000, b"VP8 "),
    "WebP, lossless": webp(16_000, 16_000, b"VP8L"),
    "WebP, extended": webp(2**24, 2**24, b"VP8X"),
    "GIF": gif(65_535, 65_535),
    "GIF, its frame": gif_with_a_frame_beyond_its_screen(65_535, 65_535),
    "BMP": bmp(100_000, 100_000),
    "BMP, upside down": bmp(100_000, -100_000),
    "JPEG": jpeg(65_500, 65_500),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    assert verdict(BOMBS[name]).reason == "too many pixels"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "JPEG"])
def test_the_limit_of_pixels_is_exact_in_every_format(kind: str) -> None:
    data = encode(pixels(0, 0, 31, 40), kind)
    assert verdict(data, max_pixels=31 * 40 - 1).detail == "40 x 31; image.max_pixels is 1239"
    decode(data, ImageSpec(8, max_pixels=31 * 40), 0)


def test_bombs_in_the_texts_and_the_profile_of_a_png_are_not_unpacked() -> None:
    zeros = zlib.compress(bytes(50_000_000), 9)
    lines = (b"IDAT", zlib.compress((b"\0" + bytes(27)) * 9))
    for chunk in (
        (b"iCCP", b"p\0\0" + zeros),
        (b"zTXt", b"Comment\0\0" + zeros),
        (b"iTXt", b"Comment\0\1\0\0\0" + zeros),
    ):
        np.testing.assert_array_equal(whole(png((9, 9, 8, 2), chunk, lines)), whole(png((9, 9, 8, 2), lines)))
    # More data than the size asks for is left undecoded.
    more = png((9, 9, 8, 2), (b"IDAT", zlib.compress((b"\0" + bytes(27)) * 9 + bytes(50_000_000), 9)))
    assert (whole(more) == 0).all()


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encode(pixels(0, 0, 32, 32), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    assert verdict(data[:-2] + scan * 3000 + data[-2:]).detail == "3010 scans; at most 100 are decoded"
    decode(data, ImageSpec(8))


def test_bytes_like_scans_do_not_count_in_a_jpeg_that_has_only_one() -> None:
    data = encode(pixels(0, 0, 32, 32), "JPEG")
    noted = data[:2] + b"\xff\xfe\2\2" + b"\xff\xda" * 256 + data[2:]  # in a comment of 512 bytes
    np.testing.assert_array_equal(whole(noted, 32), whole(data, 32))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9000), (9000, 1), (2, 30_000), (7, 5)])
def test_tiny_and_extreme_shapes(kind: str, shape: tuple[int, int]) -> None:
    level = np.full((*shape, 3), 130, np.uint8)
    data = encode(level, kind)
    for key in (None, *range(5)):
        found, (x, y, w, h, _) = decode(data, ImageSpec(224, (0.05, 1.0), flip=True), key)
        assert np.abs(found.astype(int) - 130).max() <= 1
        assert 0 <= x <= x + w <= shape[1]
        assert 0 <= y <= y + h <= shape[0]
        assert min(w, h) >= 1


def test_pillows_own_warning_of_large_images_is_not_given() -> None:
    """Pillow warns above 89 million pixels, which a recipe may allow; the test lowers that limit to 100."""
    code = (
        "import sys, numpy as np; from PIL import Image; Image.MAX_IMAGE_PIXELS = 100; "
        "from data_pipeline.transforms.decode import ImageSpec, decode_image; "
        "decode_image(sys.stdin.buffer.read(), ImageSpec(8), None, np.empty((8, 8, 3), np.uint8))"
    )
    data = encode(pixels(0, 0, 12, 12))
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stderr == b""


def test_versions_name_both_decoders() -> None:
    import simplejpeg

    found = decoder_versions()
    assert found["simplejpeg"] == simplejpeg.__version__
    assert found["pillow"] == Image.__version__
    assert found["pillow.jpg"] == features.version("jpg")
    assert found["pillow.zlib"] == features.version("zlib")
    assert all(isinstance(value, str) and value for value in found.values())
