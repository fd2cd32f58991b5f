"""Histograms and a scatter plot as inline SVG. Colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 12, 348, 22, 168
INSET = 32  # room for the tick labels left of a scatter plot
BINS = 28
MAX_POINTS = 800


@dataclass(frozen=True)
class Figure:
    """A plot with its title and one sentence about its values. `svg` is empty if all values are equal."""

    title: str
    svg: Markup
    note: str


def histogram(title: str, values: Sequence[float], unit: str, log: bool = False) -> Figure | None:
    """Plot counts in bins of equal width, or of equal ratio if `log`. Return None if there are no finite values."""
    values = sorted(value for value in values if math.isfinite(value))
    if not values:
        return None
    low, high, median = values[0], values[-1], values[len(values) // 2]
    middle_98 = f"{number(values[len(values) // 100])} to {number(values[-1 - len(values) // 100])} {unit}"
    note = (
        f"median {number(median)} {unit}; 98 % are within {middle_98}"
        if len(values) >= 100
        else f"median {number(median)} {unit}; {number(low)} to {number(high)} {unit}"
    )
    if low == high:
        return Figure(title, Markup(""), f"all {len(values):,} are {number(low)} {unit}")
    log = log and low >= 0 and high > 20 * max(low, 1)
    scale = _log_scale(max(low, 1), high) if log else _scale(low, high)
    whole = all(value == int(value) for value in values)
    one_bin_per_number = whole and not log and high - low < BINS
    bins = int(high - low) + 1 if one_bin_per_number else BINS
    if one_bin_per_number:
        scale = _scale(low - 0.5, high + 0.5)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(scale(value) * bins)))] += 1
    highest = max(counts)
    step = (RIGHT - LEFT) / bins
    bars = []
    for i, count in enumerate(counts):
        if count:
            tall = max(1.5, (BOTTOM - TOP) * count / highest)  # 1.5 keeps a single value visible
            bars.append(
                f'<rect x="{LEFT + i * step + 0.5:.1f}" y="{BOTTOM - tall:.1f}" width="{step - 1:.1f}" '
                f'height="{tall:.1f}" rx="1.5"><title>{count:,}</title></rect>'
            )
    ticks = _log_ticks(max(low, 1), high) if log else _ticks(low, high, whole)
    marks = [_tick(LEFT + scale(tick) * (RIGHT - LEFT), number(tick)) for tick in ticks]
    at = LEFT + scale(median) * (RIGHT - LEFT)
    anchor = "start" if at < WIDTH / 2 else "end"
    median_mark = (
        f'<line class="median" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{BOTTOM}"/>'
        f'<text class="median" x="{at + (5 if anchor == "start" else -5):.1f}" y="{TOP - 8}" '
        f'text-anchor="{anchor}">median {number(median)}</text>'
    )
    return Figure(
        title, _svg(title, f'<g class="bars">{"".join(bars)}</g>', *marks, _base(), median_mark), note
    )


def scatter(title: str, widths: Sequence[float], heights: Sequence[float]) -> Figure | None:
    """Plot height over width on log scales, with the line width = height. Return None if there are no sizes."""
    points = [(w, h) for w, h in zip(widths, heights, strict=True) if w > 0 and h > 0]
    if not points:
        return None
    sizes = [side for point in points for side in point]
    low, high = min(sizes), max(sizes)
    wide = sum(w > h for w, h in points)
    tall = sum(w < h for w, h in points)
    square = len(points) - wide - tall
    note = f"x: width, y: height; {wide:,} wider than high, {tall:,} higher than wide, {square:,} square"
    if low == high:
        return Figure(title, Markup(""), f"all {len(points):,} are {number(low)} × {number(low)} pixels")
    scale = _log_scale(low / 1.15, high * 1.15)
    top, bottom = 8, BOTTOM
    shown = points[:: -(-len(points) // MAX_POINTS)]
    # Points at the same place are drawn as one larger circle: this keeps the page small.
    spots: dict[tuple[int, int], int] = {}
    for w, h in shown:
        spot = (
            round(LEFT + INSET + scale(w) * (RIGHT - LEFT - INSET)),
            round(bottom - scale(h) * (bottom - top)),
        )
        spots[spot] = spots.get(spot, 0) + 1
    circles = "".join(
        f'<circle cx="{x}" cy="{y}" r="{min(9, 1.8 + 0.7 * math.sqrt(count - 1)):.1f}"/>'
        for (x, y), count in spots.items()
    )
    marks = []
    for tick in _doubling_ticks(low, high):
        marks.append(_tick(LEFT + INSET + scale(tick) * (RIGHT - LEFT - INSET), number(tick)))
        marks.append(
            f'<text x="{LEFT + INSET - 6}" y="{bottom - scale(tick) * (bottom - top) + 3:.1f}" text-anchor="end">'
            f"{number(tick)}</text>"
        )
    line = f'<line class="median" x1="{LEFT + INSET}" y1="{bottom}" x2="{RIGHT}" y2="{top}"/>'
    return Figure(
        title, _svg(title, *marks, _base(LEFT + INSET), line, f'<g class="dots">{circles}</g>'), note
    )


def number(value: float) -> str:
    """Format a number with three significant digits, such as 1.23M or 0.314. Integers below 10,000 stay exact."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g}{letter}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _svg(title: str, *parts: str) -> Markup:
    frame = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
    return frame + Markup("".join(parts)) + Markup("</svg>")


def _base(left: float = LEFT) -> str:
    return f'<line class="base" x1="{left}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'


def _tick(x: float, label: str) -> str:
    return (
        f'<text x="{min(max(x, 14), WIDTH - 14):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{label}</text>'
    )


def _scale(low: float, high: float) -> Callable[[float], float]:
    return lambda value: (value - low) / (high - low)


def _log_scale(low: float, high: float) -> Callable[[float], float]:
    span = math.log(high / low)
    return lambda value: math.log(max(value, low) / low) / span


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Return about three to seven round numbers between low and high."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step)
    return [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    times = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    return [t * 10.0**p for p in powers for t in times if low <= t * 10.0**p <= high]


def _doubling_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log2(low / 1.15)), math.ceil(math.log2(high * 1.15)) + 1)
    ticks = [2.0**p for p in powers if low / 1.15 <= 2.0**p <= high * 1.15]
    return ticks if len(ticks) >= 2 else [low, high]
