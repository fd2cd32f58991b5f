"""Pictures for the HTML page: images with their training crops, conversations with their boxes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import ContentError, UserError
from data_pipeline.formats.records import image_url
from data_pipeline.show.members import default_caption, json_fields, read_members
from data_pipeline.sources.sample_check import image_bytes
from data_pipeline.sources.tar import Sample, image_member
from data_pipeline.transforms.augment import draw_augmentations
from data_pipeline.transforms.decode import (
    ImageSpec,
    as_rgb,
    decode_image,
    open_image,
    upright_orientation,
    upright_size,
)

CROP_SCALE = (0.4, 1.0)  # share of the area
CROP_SIZES = (224, 112, 64, 32)  # pixels
MAX_SIDE = 420  # pixels of an uncropped image on the page
MAX_PNG_PIXELS = 64 * 64  # an image of at most this many pixels is embedded without loss
MAX_CAPTION = 600  # characters shown of a caption
MAX_URL = 300
MAX_TURN = 1500
MAX_TURNS = 12  # shown of a conversation
EXIF_ORIENTATION = 0x0112
PILLOW_MISSING = "the HTML page needs Pillow: pip install 'dromos[train]', or omit --html"
# PaliGemma's box: y0 x0 y1 x1, each in 1024 bins.
LOC_BOX = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>")
TOKENS = re.compile(r"<image>|(?:<(?:loc|seg)\d+>)+")


@dataclass(frozen=True)
class Picture:
    """One image on the page.

    `whole` and `crop` are data URIs. `width` and `height` are pixels of the upright original. `box` is the crop as
    (left, top, width, height) in percent of the original, `box_pixels` its (width, height) in pixels.
    """

    whole: str
    crop: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    box_pixels: tuple[int, int]
    mirrored: bool
    key: str = ""
    member: str = ""
    bytes: int = 0
    shard: str = ""
    caption: str = ""
    url: str = ""


@dataclass
class ConversationCard:
    """One conversation on the page.

    Each turn is (role, parts); a part is (plain text, the special token that follows it). `boxes` are (left, top,
    width, height) in percent of the image. `missing` holds one line per image that could not be shown.
    """

    key: str
    turns: list[tuple[str, list[tuple[str, str]]]]
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def sample_pictures(places: Sequence[tuple[str, Sample]], show: int) -> tuple[list[Picture], ImageSpec]:
    """Up to `show` of the samples (tar and sample), evenly spaced, and the size and crops that were chosen for them.

    The images can be decoded. The random crops depend on the key of the sample.
    """
    spec = ImageSpec(_crop_size(places), CROP_SCALE, flip=True)
    number = min(show, len(places))
    chosen = [places[i * len(places) // number] for i in range(number)]
    return [_picture(url, sample, spec) for url, sample in chosen], spec


def conversation_cards(records: Sequence[Mapping[str, Any]], root: str) -> tuple[list[ConversationCard], int]:
    """Return a card per record, with its images from the folder `root`, and the number of missing images.

    Raises UserError if Pillow is not installed.
    """
    require_pillow()
    cards = [_conversation_card(record, root) for record in records]
    return cards, sum(len(card.missing) for card in cards)


def require_pillow() -> None:
    """Raise UserError if Pillow, which the extra `train` installs, is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UserError(PILLOW_MISSING) from None


def decode_picture(data: bytes, spec: ImageSpec, key: str, **about: Any) -> Picture:
    """Decode an image file into a `Picture`, with the random crop that belongs to `key`.

    `about` sets further fields of `Picture`. Raises ContentError as `decode_image` does.
    """
    (augmentation,) = draw_augmentations(
        np.array([xxhash.xxh64_intdigest(key.encode("utf-8", "replace"))], np.uint64)
    )
    pixels = np.empty((spec.size, spec.size, 3), np.uint8)
    x, y, w, h, mirrored = decode_image(data, spec, augmentation, pixels)
    whole, (width, height) = _thumbnail(data)
    box = (100 * x / width, 100 * y / height, 100 * w / width, 100 * h / height)
    return Picture(
        whole, data_uri(pixels), width, height, box, (w, h), bool(mirrored), key=key, bytes=len(data), **about
    )


def data_uri(pixels: np.ndarray) -> str:
    """Encode uint8 [height, width, 3] as a `data:` URI: JPEG, or PNG if the image is small."""
    from PIL import Image

    image = Image.fromarray(pixels)
    out = io.BytesIO()
    if image.width * image.height <= MAX_PNG_PIXELS:
        image.save(out, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
    image.save(out, "JPEG", quality=82, optimize=True, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def location_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """Return the boxes in PaliGemma's <loc> tokens as (left, top, width, height) in percent of the image."""
    boxes = []
    for match in LOC_BOX.finditer(text):
        y0, x0, y1, x1 = (int(number) / 10.24 for number in match.groups())
        boxes.append((x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)))
    return boxes


def _picture(url: str, sample: Sample, spec: ImageSpec) -> Picture:
    members = read_members(url, sample)
    return decode_picture(
        image_bytes(members),
        spec,
        sample.key,
        member=image_member(members),
        shard=url.rpartition("/")[2],
        caption=default_caption(members)[:MAX_CAPTION],
        url=str(json_fields(members).get("url") or "")[:MAX_URL],
    )


def _thumbnail(data: bytes) -> tuple[str, tuple[int, int]]:
    """Return the upright image scaled down to MAX_SIDE, as a data URI, and its original (width, height)."""
    from PIL import ImageOps

    size = upright_size(data)
    with open_image(data) as image:
        image.draft("RGB", (2 * MAX_SIDE, 2 * MAX_SIDE))
        orientation = upright_orientation(data, image)
        small = as_rgb(image)
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    if orientation != 1:
        small.getexif()[EXIF_ORIENTATION] = orientation
        small = ImageOps.exif_transpose(small)
    return data_uri(np.asarray(small)), size


def _crop_size(chosen: Sequence[tuple[str, Sample]]) -> int:
    """Return the largest of CROP_SIZES that is at most the median shorter side of about nine images."""
    sides = sorted(
        min(upright_size(image_bytes(read_members(url, sample))))
        for url, sample in chosen[:: max(1, len(chosen) // 9)]
    )
    median = sides[len(sides) // 2] if sides else CROP_SIZES[0]
    return next((size for size in CROP_SIZES if size <= median), CROP_SIZES[-1])


def _conversation_card(record: Mapping[str, Any], root: str) -> ConversationCard:
    turns = record["turns"][:MAX_TURNS]
    card = ConversationCard(
        record["key"], [(turn["role"], _split_tokens(turn["text"][:MAX_TURN])) for turn in turns]
    )
    for turn in turns:
        card.boxes += location_boxes(turn["text"])
    for path in record["images"]:
        try:
            data = storage.read_bytes(image_url(path, root))
            card.pictures.append(decode_picture(data, ImageSpec(32), path))
        except ContentError as error:
            card.missing.append(f"{path}: {error}")
        except OSError as error:
            card.missing.append(f"{path} could not be read in {root}: {error.strerror or error}")
    return card


def _split_tokens(text: str) -> list[tuple[str, str]]:
    """Split a text into (plain text, the special token that follows it), so that the page can style the tokens."""
    parts, end = [], 0
    for match in TOKENS.finditer(text):
        parts.append((text[end : match.start()], match.group()))
        end = match.end()
    return [*parts, (text[end:], "")]
