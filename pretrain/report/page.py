"""The pieces a report is made of, and their rendering into one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2
import numpy as np
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Key:
    """An entry of a plot's legend; `colour` numbers the page's palette, `mark` is line, thin, dashed or bar."""

    label: str
    colour: int
    mark: str = "line"


@dataclass(frozen=True)
class Plot:
    """A drawn figure with its legend."""

    kind: ClassVar[str] = "plot"
    title: str
    svg: Markup
    legend: Sequence[Key] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `left` columns hold words, the others numbers. `boxed` puts it among plots."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""
    boxed: bool = False


@dataclass(frozen=True)
class Tile:
    """One figure that is worth a large print."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI; `alt` is read where it cannot be seen."""

    source: str
    alt: str
    label: str = ""


@dataclass(frozen=True)
class Card:
    """Pictures that belong together, and what is said of them: (label, text)."""

    pictures: Sequence[Picture]
    lines: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Gallery:
    kind: ClassVar[str] = "gallery"
    cards: Sequence[Card]
    title: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Matrix:
    """Counts `[true][predicted]`, shaded by their share of the row."""

    kind: ClassVar[str] = "matrix"
    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]

    def share(self, row: int, column: int) -> str:
        total = sum(self.counts[row])
        return f"{self.counts[row][column] / total:.3f}" if total else "0"


@dataclass(frozen=True)
class Folded:
    """Long text that is shown on request."""

    kind: ClassVar[str] = "folded"
    title: str
    text: str


Block = Plot | Table | Tiles | Gallery | Matrix | Folded


@dataclass
class Section:
    """A finding: what it is (`name`, for the page's index), what it says, how to read it, and its pieces.

    `missing` holds lines about what could not be shown, and why.
    """

    name: str
    title: str
    text: Sequence[str] = ()
    blocks: list[Block] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())

    @property
    def split(self) -> bool:
        """Whether words and a single figure stand side by side."""
        return bool(self.text) and len(self.blocks) == 1 and self.blocks[0].kind in ("plot", "matrix")

    def runs(self) -> list[tuple[str, list[Block]]]:
        """Neighbouring figures together, as they share rows of the page: ("plots" or "other", blocks)."""
        found: list[tuple[str, list[Block]]] = []
        for block in self.blocks:
            figure = block.kind in ("plot", "matrix") or (isinstance(block, Table) and block.boxed)
            group = "plots" if figure else "other"
            if group == "plots" and found and found[-1][0] == group:
                found[-1][1].append(block)
            else:
                found.append((group, [block]))
        return found


@dataclass
class Page:
    """A whole report."""

    title: str
    lead: str
    sections: list[Section]
    tiles: Tiles | None = None
    foot: str = ""


def marked(text: str) -> Markup:
    """Text with what stands in `backticks` as code; everything is escaped."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def render(page: Page) -> str:
    """The page as HTML that needs nothing from outside; whatever is not drawn by `plots` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = marked
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").render(page=page, style=style)


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
