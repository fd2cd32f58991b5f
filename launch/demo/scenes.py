"""The demo's rendered scenes: one or two coloured shapes, with captions as alt text and as full sentences.

All random choices are hashes of a key, so scenes and captions do not depend on the version of Python.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import xxhash

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

T = TypeVar("T")

SIDE = 32
SUPERSAMPLING = 4
JPEG_QUALITY = 95
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 25, 30),
    "green": (15, 140, 45),
    "blue": (30, 65, 225),
    "yellow": (250, 220, 15),
    "orange": (255, 130, 0),
    "purple": (125, 35, 165),
    "pink": (255, 120, 195),
    "cyan": (15, 205, 225),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (145, 145, 145),
    "black": (12, 12, 12),
    "beige": (232, 214, 180),
    "light blue": (175, 205, 250),
    "light green": (185, 235, 185),
}
DIAMETERS = {"small": 9.0, "large": 15.0}  # pixels of SIDE
PLACES = {
    "in the centre": (16, 16),
    "on the left": (8, 16),
    "on the right": (24, 16),
    "at the top": (16, 8),
    "at the bottom": (16, 24),
}
LAYOUTS = {"beside": ((8, 16), (24, 16)), "above": ((16, 8), (16, 24))}
MIN_CONTRAST = 120.0  # minimum Euclidean distance in RGB between a shape and the background
SINGLE_SHARE = 0.15  # share of scenes with one shape


class Choices:
    """A reproducible sequence of random choices. It depends only on its key, not on the version of Python."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._draws = 0

    def number(self) -> float:
        """Return the next number, uniform in [0, 1)."""
        self._draws += 1
        return xxhash.xxh64_intdigest(f"{self._key}/{self._draws}".encode()) / 2.0**64

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.number() * len(options))]


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing at a place, or two things, the first to the left of or above the second.

    `layout` is a key of PLACES for one thing and of LAYOUTS for two.
    """

    things: tuple[Thing, ...]
    layout: str
    background: str

    def key(self) -> str:
        """Return the identity of the scene, which determines its domain and its split."""
        return f"{'; '.join(map(str, self.things))} | {self.layout} | {self.background}"


def scenes(seed: int) -> Iterator[Scene]:
    """Yield distinct scenes without end. Every shape has MIN_CONTRAST to the background."""
    yielded = set()
    choices = Choices(f"scenes/{seed}")
    while True:
        background = choices.pick(list(BACKGROUNDS))
        single = choices.number() < SINGLE_SHARE
        things = tuple(_random_thing(choices) for _ in range(1 if single else 2))
        layout = choices.pick(list(PLACES if single else LAYOUTS))
        scene = Scene(things, layout, background)
        identical = not single and (things[0].colour, things[0].shape) == (things[1].colour, things[1].shape)
        if (
            scene in yielded
            or identical
            or not all(_has_contrast(thing.colour, background) for thing in things)
        ):
            continue
        yielded.add(scene)
        yield scene


def _random_thing(choices: Choices) -> Thing:
    return Thing(choices.pick(list(DIAMETERS)), choices.pick(list(COLOURS)), choices.pick(SHAPES))


def _has_contrast(colour: str, background: str) -> bool:
    pairs = zip(COLOURS[colour], BACKGROUNDS[background], strict=True)
    return sum((a - b) ** 2 for a, b in pairs) >= MIN_CONTRAST**2


def render(scene: Scene) -> bytes:
    """Return the scene as a JPEG of SIDE x SIDE pixels. A hash of the scene's key shifts the positions a little."""
    from PIL import Image, ImageDraw

    choices = Choices(f"places/{scene.key()}")
    image = Image.new("RGB", (SIDE * SUPERSAMPLING,) * 2, BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    centres = [PLACES[scene.layout]] if len(scene.things) == 1 else LAYOUTS[scene.layout]
    for thing, centre in zip(scene.things, centres, strict=True):
        diameter = DIAMETERS[thing.size]
        x, y = (c + _jitter(choices, diameter, inside=c != SIDE // 2) for c in centre)
        _draw_shape(draw, thing, x, y, diameter, BACKGROUNDS[scene.background])
    return encode(image.reduce(SUPERSAMPLING))


def _jitter(choices: Choices, diameter: float, inside: bool) -> float:
    """Return an offset in pixels that keeps the thing in its half of the image (`inside`), or near the centre line."""
    room = (SIDE / 2 - diameter) / 2 - 0.25 if inside else 2.5
    return (2 * choices.number() - 1) * max(room, 0.0)


def encode(image: Image.Image) -> bytes:
    """Encode as JPEG without chroma subsampling, which would blur a shape of nine pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _draw_shape(
    draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, diameter: float, hole: tuple[int, int, int]
) -> None:
    fill = COLOURS[thing.colour]
    x, y, radius = (v * SUPERSAMPLING for v in (x, y, diameter / 2))

    def box(share: float, tall: float | None = None) -> tuple[float, float, float, float]:
        wide, high = radius * share, radius * (share if tall is None else tall)
        return (x - wide, y - high, x + wide, y + high)

    if thing.shape == "circle":
        draw.ellipse(box(1.0), fill=fill)
    elif thing.shape == "ring":
        draw.ellipse(box(1.0), fill=fill)
        draw.ellipse(box(0.52), fill=hole)
    elif thing.shape == "square":
        draw.rectangle(box(0.92), fill=fill)
    elif thing.shape == "cross":
        draw.rectangle(box(1.0, 0.32), fill=fill)
        draw.rectangle(box(0.32, 1.0), fill=fill)
    else:
        corners = [(x, y - radius), (x - radius, y + 0.8 * radius), (x + radius, y + 0.8 * radius)]
        draw.polygon(corners, fill=fill)


ALT_TEXT_NOISE = (
    "{}", "{}", "{}", "{}", "img {}", "{} stock photo", "{} clipart", "photo: {}", "{} - free download", "image of {}",
)  # fmt: skip


def alt_text(scene: Scene) -> str:
    """Return a caption like alt text on the web: terse, with missing details and meaningless additions."""
    choices = Choices(f"alt/{scene.key()}")
    names = [
        str(thing) if choices.number() < 0.3 else f"{thing.colour} {thing.shape}" for thing in scene.things
    ]
    text = choices.pick((", ", ", ", " and ", " ")).join(names)
    if choices.number() < 0.25:
        text += f", {scene.background} background"
    return choices.pick(ALT_TEXT_NOISE).format(text)


PAIR_SENTENCES = (
    "A {a} is {relation} a {b} on a {background} background.",
    "On a {background} background, a {a} is {relation} a {b}.",
    "The image shows a {a} {relation} a {b}. The background is {background}.",
)
SINGLE_SENTENCES = (
    "A {a} is {place} of a {background} background.",
    "On a {background} background, there is a {a} {place}.",
    "The image shows a {a} {place}. The background is {background}.",
)
RELATIONS = {"beside": ("to the left of", "to the right of"), "above": ("above", "below")}


def sentence(scene: Scene) -> str:
    """Return a caption like that of a captioning model: every detail of the scene, in full sentences."""
    choices = Choices(f"sentence/{scene.key()}")
    if len(scene.things) == 1:
        return choices.pick(SINGLE_SENTENCES).format(
            a=scene.things[0], place=scene.layout, background=scene.background
        )
    backwards = choices.number() < 0.5
    first, second = scene.things[::-1] if backwards else scene.things
    relation = RELATIONS[scene.layout][backwards]
    return choices.pick(PAIR_SENTENCES).format(
        a=first, b=second, relation=relation, background=scene.background
    )
