"""Pictures of a source as training would see them: the whole with the crop drawn on it, and the crop itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import ContentError, UserError
from data_pipeline.formats.records import BadRecord, image_url
from data_pipeline.show.tars import caption, metadata, read_members
from data_pipeline.sources.tar import Sample, image_member
from data_pipeline.transforms.augment import draw_rows
from data_pipeline.transforms.decode import FORMATS, ImageSpec, as_rgb, decode_image

CROP = (0.4, 1.0)
SIZES = (224, 112, 64, 32)
LONGEST_SIDE = 420  # pixels of a whole picture on the page
EXAMINE = 240  # pictures that are decoded
NEEDED = "pictures need Pillow: pip install 'dromos[train]', or leave out --html"
TURN = 1500  # characters of a turn
TURNS = 12
# PaliGemma's corners y0 x0 y1 x1 in 1024 bins.
CORNERS = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>")
TOKENS = re.compile(r"<image>|(?:<(?:loc|seg)\d+>)+")


@dataclass(frozen=True)
class Figures:
    """What the page draws of the pictures examined."""

    width: list[float] = field(default_factory=list)
    height: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """One picture: data URIs, pixels of the upright original, the crop in percent of it."""

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
class Look:
    """`examined` samples: `pictures` of some, `figures` of all, `bad` of those that training would replace."""

    spec: ImageSpec
    examined: int = 0
    pictures: list[Picture] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    bad: list[BadRecord] = field(default_factory=list)


def look_at(tables: Mapping[str, Sequence[Sample]], show: int) -> Look:
    """Decode up to EXAMINE samples spread over the shards, and keep `show` pictures of them.

    Each is decoded as training does it; the crops are random ones by the sample's key. Raises UserError where
    Pillow is not installed.
    """
    need_pillow()
    places = [(url, sample) for url, table in tables.items() for sample in table]
    number = min(EXAMINE, len(places))
    chosen = [places[i * len(places) // number] for i in range(number)]
    look = Look(ImageSpec(_size(chosen), CROP, flip=True))
    keep = {i * number // show for i in range(show)}
    for i, (url, sample) in enumerate(chosen):
        look.examined += 1
        members = read_members(url, sample)
        try:
            picture = _picture(url, sample, members, look, i in keep)
        except ContentError as error:
            look.bad.append(BadRecord(url, sample.key, error.reason, error.detail))
            continue
        if picture is not None:
            look.pictures.append(picture)
        said = caption(members)
        if said is not None and said.strip():
            look.figures.captions.append(said)
            look.figures.words.append(len(said.split()))
        else:
            look.bad.append(BadRecord(url, sample.key, "missing caption"))
    return look


def need_pillow() -> None:
    """Raise UserError where Pillow, of the extra `train`, is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UserError(NEEDED) from None


def picture_of(data: bytes, spec: ImageSpec, key: str, **about: Any) -> Picture:
    """A picture and its crop. Raises ContentError as `decode_image` does."""
    (draw,) = draw_rows(np.array([xxhash.xxh64_intdigest(key.encode("utf-8", "replace"))], np.uint64))
    pixels = np.empty((spec.size, spec.size, 3), np.uint8)
    x, y, w, h, mirrored = decode_image(data, spec, draw, pixels)
    whole, (width, height) = _whole(data)
    box = (100 * x / width, 100 * y / height, 100 * w / width, 100 * h / height)
    return Picture(
        whole, data_uri(pixels), width, height, box, (w, h), bool(mirrored), key=key, bytes=len(data), **about
    )


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [height, width, 3] as a JPEG in a `data:` address; as PNG where that is small anyway."""
    from PIL import Image

    image = Image.fromarray(pixels)
    out = io.BytesIO()
    if image.width * image.height <= 64 * 64:
        image.save(out, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
    image.save(out, "JPEG", quality=82, optimize=True, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _picture(url: str, sample: Sample, members: dict[str, bytes], look: Look, keep: bool) -> Picture | None:
    extension = image_member(members)
    if extension is None:
        raise ContentError("missing image", f"members: {', '.join(members) or 'none'}")
    data = members[extension]
    if keep:
        picture = picture_of(
            data,
            look.spec,
            sample.key,
            member=extension,
            shard=url.rpartition("/")[2],
            caption=(caption(members) or "")[:600],
            url=str(metadata(members).get("url") or "")[:300],
        )
        width, height = picture.width, picture.height
    else:
        decode_image(data, look.spec, None, np.empty((look.spec.size, look.spec.size, 3), np.uint8))
        picture, (width, height) = None, _upright_size(data)
    look.figures.width.append(width)
    look.figures.height.append(height)
    look.figures.bytes.append(len(data))
    return picture


def _open(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=FORMATS)


def _upright_size(data: bytes) -> tuple[int, int]:
    with _open(data) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else image.size


def _whole(data: bytes) -> tuple[str, tuple[int, int]]:
    """The upright picture made small, and the size it had."""
    from PIL import ImageOps

    size = _upright_size(data)
    with _open(data) as image:
        image.draft("RGB", (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))
        orientation = image.getexif().get(0x0112, 1)
        small = as_rgb(image)
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    if orientation != 1:
        small.getexif()[0x0112] = orientation
        small = ImageOps.exif_transpose(small)
    return data_uri(np.asarray(small)), size


def _size(chosen: Sequence[tuple[str, Sample]]) -> int:
    """The largest of SIZES that most of a few pictures fill."""
    sides = sorted(_few_sides(chosen[:: max(1, len(chosen) // 9)]))
    middle = sides[len(sides) // 2] if sides else SIZES[0]
    return next((size for size in SIZES if size <= middle), SIZES[-1])


def _few_sides(chosen: Sequence[tuple[str, Sample]]) -> Iterator[int]:
    for url, sample in chosen:
        members = read_members(url, sample)
        extension = image_member(members)
        try:
            yield min(_upright_size(members[extension])) if extension else 0
        except Exception:  # what is wrong with the picture is said where it is decoded
            continue


@dataclass
class Talk:
    """`turns`: role and parts, each a text and the token behind it; `boxes` in percent of the picture."""

    key: str
    turns: list[tuple[str, list[tuple[str, str]]]]
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def talks(records: Sequence[Mapping[str, Any]], root: str) -> tuple[list[Talk], int]:
    """The records as talks with the pictures found below `root`, and how many pictures were not."""
    need_pillow()
    made = [_talk(record, root) for record in records]
    return made, sum(len(talk.missing) for talk in made)


def boxes(text: str) -> list[tuple[float, float, float, float]]:
    """(left, top, width, height) in percent, of every four corners in the text."""
    found = []
    for match in CORNERS.finditer(text):
        y0, x0, y1, x1 = (int(number) / 10.24 for number in match.groups())
        found.append((x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)))
    return found


def _talk(record: Mapping[str, Any], root: str) -> Talk:
    turns = record["turns"][:TURNS]
    talk = Talk(record["key"], [(turn["role"], _parts(turn["text"][:TURN])) for turn in turns])
    for turn in turns:
        talk.boxes += boxes(turn["text"])
    for path in record["images"]:
        try:
            data = storage.read_bytes(image_url(path, root))
            talk.pictures.append(picture_of(data, ImageSpec(32), path))
        except ContentError as error:
            talk.missing.append(f"{path}: {error}")
        except OSError as error:
            talk.missing.append(f"{path} cannot be read below {root}: {error.strerror or error}")
    return talk


def _parts(text: str) -> list[tuple[str, str]]:
    """Plain text and the token that follows it, so that tokens can be set apart."""
    parts, end = [], 0
    for match in TOKENS.finditer(text):
        parts.append((text[end : match.start()], match.group()))
        end = match.end()
    return [*parts, (text[end:], "")]
