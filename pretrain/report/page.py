"""Page elements (plots, tables, tiles, galleries) and their rendering as one self-contained HTML page."""

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
class LegendEntry:
    """One legend entry. `colour` is an index into the page's palette; `mark` is line, thin, dashed or tick."""

    label: str
    colour: int
    mark: str = "line"


@dataclass(frozen=True)
class Plot:
    """An SVG plot with its legend and a note below it."""

    kind: ClassVar[str] = "plot"
    title: str
    svg: Markup
    legend: Sequence[LegendEntry] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table. The first `left` columns are text, the others numbers; `boxed` places the table beside plots.

    `wraps` breaks long text in the last column; other cells keep to one line.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""
    boxed: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class Tile:
    """One number in large print, with its label."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its alternative text."""

    source: str
    alt: str
    label: str = ""


@dataclass(frozen=True)
class Card:
    """Related pictures, and lines (label, text) about them."""

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
    """Confusion matrix `[true][predicted]`; cells are shaded by their share of the row."""

    kind: ClassVar[str] = "matrix"
    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]

    def share(self, row: int, column: int) -> str:
        total = sum(self.counts[row])
        return f"{self.counts[row][column] / total:.3f}" if total else "0"


@dataclass(frozen=True)
class Collapsible:
    """Long text that the reader can expand."""

    kind: ClassVar[str] = "collapsible"
    title: str
    text: str


Block = Plot | Table | Tiles | Gallery | Matrix | Collapsible


@dataclass
class Section:
    """One section of the page.

    `name` is its entry in the navigation, `title` states the finding, `text` explains it, `blocks` show it. `missing`
    has one line per element that could not be shown, with the reason.
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
        """True if the text is placed beside the only plot or matrix of the section."""
        return bool(self.text) and len(self.blocks) == 1 and self.blocks[0].kind in ("plot", "matrix")

    def block_groups(self) -> list[tuple[str, list[Block]]]:
        """Group adjacent plots, which share a row of the page: ("plots", blocks) or ("other", [block])."""
        groups: list[tuple[str, list[Block]]] = []
        for block in self.blocks:
            is_plot = block.kind in ("plot", "matrix") or (isinstance(block, Table) and block.boxed)
            group = "plots" if is_plot else "other"
            if group == "plots" and groups and groups[-1][0] == group:
                groups[-1][1].append(block)
            else:
                groups.append((group, [block]))
        return groups


@dataclass
class Page:
    """A whole report. `tiles` are in the header, `foot` is the footer."""

    title: str
    lead: str
    sections: list[Section]
    tiles: Tiles | None = None
    foot: str = ""


def render_code(text: str) -> Markup:
    """Return the text with `backticks` as <code>, and everything escaped."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def render(page: Page) -> str:
    """Return the page as HTML that loads no other file. Everything but the SVG of `plots` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["render_code"] = render_code
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").render(page=page, style=style)


def data_uri(pixels: np.ndarray) -> str:
    """Encode uint8 `[3 or 4, height, width]` (channel 4 is opacity) as `data:image/png;base64,...`."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def show_only_patches(pixels: np.ndarray, kept: Sequence[int], patch: int) -> np.ndarray:
    """Return uint8 `[4, height, width]`: the image with every patch outside `kept` fully transparent.

    `pixels` is uint8 `[3, height, width]`, `patch` the side of a patch in pixels. Patches are numbered row by row, as
    in a vision transformer.
    """
    height, width = pixels.shape[1] // patch, pixels.shape[2] // patch
    visible = np.zeros(height * width, np.uint8)
    visible[list(kept)] = 255
    opacity = visible.reshape(height, width).repeat(patch, axis=0).repeat(patch, axis=1)
    return np.concatenate([np.where(opacity > 0, pixels, 0), opacity[None]]).astype(np.uint8)
