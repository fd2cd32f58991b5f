"""Line and bar plots as inline SVG. Colours and fonts come from the page's style sheet, also in dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from pretrain.report.page import LegendEntry, Plot

COLOURS = 8
MARK_COLOUR = COLOURS - 2
MAX_POINTS = 400
INCHES = (5.0, 3.0)
# matplotlib draws in these placeholder colours; `inline_svg` replaces them by the style sheet's variables.
PALETTE = [f"#a1b0c{number}" for number in range(COLOURS)]
INK, FRAME = "#a1b0d0", "#a1b0d1"
VARIABLES = {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE)} | {
    INK: "var(--soft)",
    FRAME: "var(--line)",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same plot gives the same bytes
    "text.parse_math": False,  # a $ in the name of a stage is not a formula
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
    """One curve. `dashed` is for bounds, `markers` for single measurements, `unsmoothed` for values of every step."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False
    markers: bool = False
    unsmoothed: bool = False

    @property
    def legend_entry(self) -> LegendEntry:
        return LegendEntry(
            self.label, self.colour, "dashed" if self.dashed else "thin" if self.unsmoothed else "line"
        )


@dataclass(frozen=True)
class Level:
    """A reference value, drawn as a dashed horizontal line."""

    label: str
    value: float
    colour: int = COLOURS - 1


def line_plot(
    title: str,
    curves: Sequence[Line],
    x: str,
    y: str,
    levels: Sequence[Level] = (),
    log: bool = False,
    note: str = "",
    whole_steps: bool = True,
    marks: Sequence[float] = (),
    marked: str = "",
) -> Plot:
    """Plot curves. `x` and `y` are the axis labels with units; `log` sets a log scale for y.

    `whole_steps` restricts the ticks of x to integers. `marks` are values of x that get a short vertical bar at the
    lower edge; the legend calls them `marked`.
    """

    def draw(axes: Any) -> None:
        from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

        for level in levels:
            axes.axhline(level.value, color=PALETTE[level.colour], linestyle=(0, (4, 3)), linewidth=1.4)
        for curve in curves:
            places, values = downsample(curve.x, curve.y)
            axes.plot(
                places,
                values,
                color=PALETTE[curve.colour % COLOURS],
                linestyle=(0, (4, 3)) if curve.dashed else "-",
                linewidth=0.8 if curve.unsmoothed else 1.8,
                alpha=0.45 if curve.unsmoothed else 1.0,
                marker="o" if curve.markers or len(values) == 1 else None,
                markersize=4.5,
            )
        if len(marks):
            marked_places = distinct(marks)
            axes.plot(
                marked_places,
                [0.04] * len(marked_places),
                transform=axes.get_xaxis_transform(),  # y as a part of the axis
                color=PALETTE[MARK_COLOUR],
                linestyle="",
                marker="|",
                markersize=11,
                markeredgewidth=1.6,
                clip_on=False,
            )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_log_ticks(*axes.get_ylim()))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_steps))
        axes.margins(x=0.02)

    legend = [curve.legend_entry for curve in curves]
    legend += [LegendEntry(level.label, level.colour, "dashed") for level in levels]
    legend += [LegendEntry(marked, MARK_COLOUR, "tick")] if len(marks) else []
    return Plot(title, _svg(title, draw), legend, note)


def bar_plot(
    title: str, names: Sequence[str], values: Sequence[float], x: str, y: str, value_format: str
) -> Plot:
    """Plot one bar per name, with its value above it in the format `value_format`, such as ".2f"."""

    def draw(axes: Any) -> None:
        drawn = axes.bar(range(len(names)), values, width=0.6, color=PALETTE[0])
        axes.bar_label(drawn, labels=[format(value, value_format) for value in values], padding=3)
        axes.set_xticks(range(len(names)), list(names))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(False, axis="x")
        axes.margins(y=0.15)

    return Plot(title, _svg(title, draw))


def downsample(
    x: Sequence[float], y: Sequence[float], max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `max_points` points: means over adjacent values. Drops values that are not finite."""
    places, values = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(places) & np.isfinite(values)
    places, values = places[finite], values[finite]
    if len(values) <= max_points:
        return places, values
    parts = np.linspace(0, len(values), max_points + 1).astype(int)[:-1]
    counts = np.diff([*parts, len(values)])
    return np.add.reduceat(places, parts) / counts, np.add.reduceat(values, parts) / counts


def _log_ticks(low: float, high: float) -> Any:
    """The tick locator of a log axis: 3 to about 10 labels for any range."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    decades = math.log10(high / low)
    if decades < 1:
        return MaxNLocator(6)
    return LogLocator(10, (1, 2, 5) if decades < 3 else (1,))


def distinct(places: Sequence[float], most: int = MAX_POINTS) -> list[float]:
    """Return at most `most` of the ascending values, those that a plot can tell apart: the first in each interval."""
    values = np.asarray(places, float)
    if len(values) <= most:
        return values.tolist()
    intervals = np.linspace(values[0], values[-1], most + 1)[1:-1]
    _, first = np.unique(np.searchsorted(intervals, values, side="right"), return_index=True)
    return values[first].tolist()


def smooth(y: Sequence[float], window: int) -> np.ndarray:
    """Return the mean over `window` neighbours (odd), fewer at the ends. Values that are not finite are skipped."""
    values = np.asarray(y, float)
    finite = np.isfinite(values)
    ones = np.ones(min(window, 2 * len(values) - 1))
    total = np.convolve(np.where(finite, values, 0.0), ones, "full")
    count = np.convolve(finite.astype(float), ones, "full")
    first = len(ones) // 2
    with np.errstate(invalid="ignore"):
        return (total / count)[first : first + len(values)]


def smoothing_window(steps: int) -> int:
    """Return the number of steps to average so that about 60 points remain visible; 1 for fewer than 60 steps."""
    return 1 if steps < 60 else 2 * math.ceil(steps / 60) + 1


def inline_svg(svg: str, title: str) -> Markup:
    """Turn matplotlib's SVG file into an element of a page, without its identifiers, fonts and URLs."""
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
    return inline_svg(out.getvalue(), title)
