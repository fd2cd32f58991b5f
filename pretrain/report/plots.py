"""Plots as inline SVG whose colours and letters are the page's, so that they follow its light and dark dress."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from pretrain.report.page import Key, Plot

COLOURS = 8
MOST_POINTS = 400
INCHES = (5.0, 3.0)
# Drawn in these stand-ins; the page's style sheet gives each its colour.
PALETTE = [f"#a1b0c{number}" for number in range(COLOURS)]
INK, FRAME = "#a1b0d0", "#a1b0d1"
VARIABLES = {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE)} | {
    INK: "var(--soft)",
    FRAME: "var(--line)",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same figure gives the same bytes
    "text.parse_math": False,  # a $ in the name of a stage is no formula
    "font.size": 10,
    "axes.edgecolor": FRAME,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FRAME,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FRAME,
    "ytick.color": FRAME,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve; `dashed` for a bound, `marks` for the points that were measured, `raw` for unsmoothed steps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False
    marks: bool = False
    raw: bool = False

    @property
    def key(self) -> Key:
        return Key(self.label, self.colour, "dashed" if self.dashed else "thin" if self.raw else "line")


@dataclass(frozen=True)
class Level:
    """A value to compare a plot's curves with, drawn from side to side."""

    label: str
    value: float
    colour: int = COLOURS - 1


def lines(
    title: str,
    curves: Sequence[Line],
    x: str,
    y: str,
    levels: Sequence[Level] = (),
    log: bool = False,
    note: str = "",
    whole_steps: bool = True,
) -> Plot:
    """Curves over x; `x` and `y` name the axes with their units."""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

        for level in levels:
            axes.axhline(level.value, color=PALETTE[level.colour], linestyle=(0, (4, 3)), linewidth=1.4)
        for curve in curves:
            places, values = thin(curve.x, curve.y)
            axes.plot(
                places,
                values,
                color=PALETTE[curve.colour % COLOURS],
                linestyle=(0, (4, 3)) if curve.dashed else "-",
                linewidth=0.8 if curve.raw else 1.8,
                alpha=0.45 if curve.raw else 1.0,
                marker="o" if curve.marks or len(values) == 1 else None,
                markersize=4.5,
            )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_steps))
        axes.margins(x=0.02)

    keys = [curve.key for curve in curves]
    keys += [Key(level.label, level.colour, "dashed") for level in levels]
    return Plot(title, _svg(title, draw), keys, note)


def bars(title: str, names: Sequence[str], values: Sequence[float], x: str, y: str, form: str) -> Plot:
    """One bar a name, each with its value above, written in the format `form`."""

    def draw(axes: Any) -> None:
        drawn = axes.bar(range(len(names)), values, width=0.6, color=PALETTE[0])
        axes.bar_label(drawn, labels=[format(value, form) for value in values], padding=3)
        axes.set_xticks(range(len(names)), list(names))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(False, axis="x")
        axes.margins(y=0.15)

    return Plot(title, _svg(title, draw))


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over runs of neighbours; values that are not finite are left out."""
    places, values = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(places) & np.isfinite(values)
    places, values = places[finite], values[finite]
    if len(values) <= most:
        return places, values
    parts = np.linspace(0, len(values), most + 1).astype(int)[:-1]
    counts = np.diff([*parts, len(values)])
    return np.add.reduceat(places, parts) / counts, np.add.reduceat(values, parts) / counts


def smooth(y: Sequence[float], window: int) -> np.ndarray:
    """Mean over `window` neighbours (odd), fewer at the ends; what is not finite does not count."""
    values = np.asarray(y, float)
    finite = np.isfinite(values)
    ones = np.ones(min(window, 2 * len(values) - 1))
    total = np.convolve(np.where(finite, values, 0.0), ones, "full")
    count = np.convolve(finite.astype(float), ones, "full")
    first = len(ones) // 2
    with np.errstate(invalid="ignore"):
        return (total / count)[first : first + len(values)]


def window_for(steps: int) -> int:
    """Steps to take the mean over so that a curve reads well; 1 where every step can be seen."""
    return 1 if steps < 60 else 2 * math.ceil(steps / 60) + 1


def inline(svg: str, title: str) -> Markup:
    """matplotlib's SVG file as an element of a page: no identifiers, fonts or addresses of its own."""
    box = re.search(r'viewBox="([^"]*)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"\s+", " ", body).replace("> <", "><").replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    assert box is not None
    return Markup(f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(title)}">{body}')


def _svg(title: str, draw: Callable[[Any], None]) -> Markup:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    return inline(out.getvalue(), title)
