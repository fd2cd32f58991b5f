"""JPEGs whose header simplejpeg refuses: Pillow decodes them, under the same limits and with the same crops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ContentError
from data_pipeline.transforms.decode import ImageSpec
from tests.data_pipeline.transforms.test_every_image import SMOOTH, decode, verdict
from tests.data_pipeline.transforms.test_image_headers import exif
from tests.support.samples import encode, pixels

simplejpeg = pytest.importorskip("simplejpeg")


def odd(image: Image.Image | np.ndarray, **options: object) -> bytes:
    """A JPEG with two bytes too many before its frame header, as some cameras write; decoders differ about it."""
    data = encode(image, "JPEG", **options)
    frame = next(data.index(marker) for marker in (b"\xff\xc0\0", b"\xff\xc2\0") if marker in data)
    data = data[:frame] + b"\0\0" + data[frame:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg_header(data)
    assert Image.open(io.BytesIO(data)).size == Image.fromarray(np.asarray(image)).size
    return data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_its_orientation_and_crop_are_those_of_a_plain_one(orientation: int) -> None:
    image = Image.fromarray(SMOOTH)
    spec = ImageSpec(70, (0.3, 0.9), flip=True)
    plain, strange = (
        make(image, exif=exif(orientation), quality=98)
        for make in (lambda *given, **more: encode(*given, "JPEG", **more), odd)
    )
    for key in (None, 0, 1, 2):
        (want, crop), (found, same) = decode(plain, spec, key), decode(strange, spec, key)
        assert crop == same
        assert np.abs(found.astype(int) - want).max() <= 4


def test_its_limit_of_pixels_is_exact() -> None:
    data = odd(pixels(0, 0, 31, 40))
    assert verdict(data, max_pixels=31 * 40 - 1).detail == "40 x 31; image.max_pixels is 1239"
    decode(data, ImageSpec(8, max_pixels=31 * 40))


@pytest.mark.parametrize("scans", [100, 101])
def test_its_number_of_scans_is_limited(scans: int) -> None:
    data = odd(pixels(0, 0, 32, 32), progressive=True)
    last, known = data.rindex(b"\xff\xda"), data.count(b"\xff\xda")
    many = data[:-2] + data[last:-2] * (scans - known) + data[-2:]
    plain = encode(pixels(0, 0, 32, 32), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    for one in (many, plain[:-2] + plain[last:-2] * (scans - known) + plain[-2:]):
        if scans > 100:
            assert verdict(one).detail == "101 scans; at most 100 are decoded"
        else:
            decode(one, ImageSpec(8))


def test_a_full_memory_is_no_verdict_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample would be replaced, and the run would go on with other data than without the shortage."""

    def full(image: Image.Image) -> None:
        raise MemoryError

    def broken(image: Image.Image) -> None:
        raise RuntimeError("codec")

    data, png = odd(pixels(0, 0, 31, 40)), encode(pixels(0, 0, 9, 9))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", full)
        for one in (data, png):
            with pytest.raises(MemoryError):
                decode(one, ImageSpec(8))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", broken)
        with pytest.raises(ContentError, match="RuntimeError: codec"):
            decode(data, ImageSpec(8))


def test_pillows_own_limit_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above twice MAX_IMAGE_PIXELS Pillow raises; a recipe's limit may be larger."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert verdict(encode(pixels(0, 0, 9, 9))).reason == "too many pixels"
