"""The sweep's curve as SVG: each metric over beta, the straight line between the parents, the best beta marked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from pretrain.merge import figures
from pretrain.merge.sweeps.results import Sweep

# CSS pixels.
WIDTH, MARGIN = 860.0, 28.0
HEADER_HEIGHT, LARGE_HEIGHT, SMALL_HEIGHT = 74.0, 330.0, 150.0
MAX_LABEL = 44  # characters of an address; longer ones lose their beginning
GAIN = "#e7f0fa"  # colour of the area where the curve is better than the straight line
Point = tuple[float, float]
Projection = Callable[[float, float], Point]


def picture(sweep: Sweep) -> str:
    """One panel per metric: the deciding metric in a large panel, the others below it in two columns."""
    names = sweep.names
    parts = _header(sweep)
    if not names:
        return figures.document(WIDTH, HEADER_HEIGHT + MARGIN, "sweep", parts)
    y = HEADER_HEIGHT
    parts += _panel(sweep, names[0], (MARGIN, y), (WIDTH - 2 * MARGIN, LARGE_HEIGHT), True)
    y += LARGE_HEIGHT + 62
    half = (WIDTH - 3 * MARGIN) / 2
    for number, name in enumerate(names[1:]):
        last = number == len(names) - 2
        left = MARGIN + (number % 2) * (half + MARGIN)
        width = (
            WIDTH - 2 * MARGIN if last and number % 2 == 0 else half
        )  # a last panel without a neighbour fills its row
        parts += _panel(sweep, name, (left, y), (width, SMALL_HEIGHT), False)
        if number % 2 or last:
            y += SMALL_HEIGHT + 56
    return figures.document(WIDTH, y - 6, f"sweep between {sweep.b} and {sweep.a}", parts)


def _header(sweep: Sweep) -> list[str]:
    """The title, and the best beta with its score."""
    direction = "less is better" if sweep.lower else "more is better"
    parts = [figures.text(MARGIN, 34, "beta x A + (1 - beta) x B", font_size=19, font_weight=650)]
    best = sweep.best
    if best is None:
        return parts
    summary = f"best: beta {best.beta:g}, {sweep.metric} {sweep.value(best):.6g}{_gain(sweep)}; {direction}"
    return [*parts, figures.text(MARGIN, 54, summary, fill=figures.FAINT)]


def _gain(sweep: Sweep) -> str:
    """The difference between the best score and that of the better parent, as text."""
    parents = [v for point in sweep.points if point.beta in (0, 1) and (v := sweep.value(point)) is not None]
    best = sweep.value(sweep.best) if sweep.best is not None else None
    if best is None or len(parents) < 2:
        return ""
    better = min(parents) if sweep.lower else max(parents)
    if best == better:
        return " (no mix is better than the better parent)"
    return f" ({best - better:+.3g} against the better parent)"


def _panel(sweep: Sweep, name: str, corner: Point, size: Point, large: bool) -> list[str]:
    """One metric over beta; `large` adds the shaded gain, the label of the best beta, and the inputs' names."""
    values = {point.beta: v for point in sweep.points if (v := (point.metrics or {}).get(name)) is not None}
    left, top = corner[0] + 58, corner[1] + 24
    width, height = size[0] - 58 - 14, size[1] - 24
    parts = [figures.text(corner[0], corner[1] + 8, name, font_weight=650, font_size=13 if large else 12)]
    if not values:
        return [*parts, figures.text(left, top + 20, "no finite values", fill=figures.FAINT)]
    ticks = figures.ticks(min(values.values()), max(values.values()), 6 if large else 3)
    low, high = ticks[0], ticks[-1]

    def project(beta: float, value: float) -> Point:
        return left + beta * width, top + height * (1 - (value - low) / (high - low))

    parts += _axes(ticks, project, (left, top), (width, height))
    parts += _curve(sweep, values, project, large)
    best = sweep.best
    if best is not None and best.beta in values:
        x, y = project(best.beta, values[best.beta])
        parts.append(
            figures.circle(x, y, 8 if large else 5.5, fill="none", stroke=figures.ORANGE, stroke_width=2)
        )
        if large:
            parts += _best_label(x, y, left, width, top, f"{best.beta:g}", values[best.beta])
    if large:
        y = top + height + 36
        parts.append(figures.text(left, y, f"B  {_shorten(sweep.b)}", fill=figures.INK))
        parts.append(
            figures.text(left + width, y, f"A  {_shorten(sweep.a)}", text_anchor="end", fill=figures.INK)
        )
        parts.append(figures.text(left + width / 2, y, "beta", text_anchor="middle", fill=figures.FAINT))
    return parts


def _axes(ticks: list[float], project: Projection, corner: Point, size: Point) -> list[str]:
    """Horizontal rules at the ticks of the metric, and ticks at every 0.2 of beta."""
    (left, top), (width, height) = corner, size
    parts = []
    for tick in ticks:
        y = project(0, tick)[1]
        parts.append(figures.line(left, y, left + width, y))
        parts.append(
            figures.text(left - 8, y + 4, f"{tick:.6g}", text_anchor="end", font_size=11, fill=figures.FAINT)
        )
    for beta in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x = project(beta, ticks[0])[0]
        parts.append(figures.line(x, top + height, x, top + height + 4, stroke=figures.FAINT))
        label = figures.text(
            x, top + height + 17, f"{beta:g}", text_anchor="middle", font_size=11, fill=figures.FAINT
        )
        parts.append(label)
    return parts


def _curve(sweep: Sweep, values: dict[float, float], project: Projection, large: bool) -> list[str]:
    """The straight line between the parents, the curve, and a dot with a tooltip per beta."""
    parts = []
    points = [project(beta, value) for beta, value in sorted(values.items())]
    if 0.0 in values and 1.0 in values:
        parts += _chord(points, sweep.lower, large)
    for segment in _segments(sweep, values):
        line = [project(beta, values[beta]) for beta in segment]
        parts.append(
            figures.path(
                line, stroke=figures.BLUE, stroke_width=2.2 if large else 1.6, stroke_linejoin="round"
            )
        )
    parts += [
        figures.circle(*project(b, v), 3.6 if large else 2.4, f"beta {b:g}: {v:.8g}", fill=figures.BLUE)
        for b, v in values.items()
    ]
    return parts


def _segments(sweep: Sweep, values: dict[float, float]) -> list[list[float]]:
    """Consecutive betas with a finite value. The curve is interrupted at scored betas without one."""
    segments: list[list[float]] = [[]]
    for point in sweep.points:
        if point.beta in values:
            segments[-1].append(point.beta)
        elif point.metrics is not None:
            segments.append([])
    return [segment for segment in segments if len(segment) > 1]


def _chord(points: list[Point], lower: bool, shaded: bool) -> list[str]:
    """The straight line between the parents; `shaded` fills the areas where the curve is better than it."""
    (x0, y0), (x1, y1) = points[0], points[-1]

    def chord(x: float) -> float:
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    sign = 1.0 if lower else -1.0  # y grows downwards
    areas: list[list[Point]] = [[]]
    for start, stop in pairwise(points) if shaded else ():
        gains = [sign * (y - chord(x)) for x, y in (start, stop)]
        if gains[0] <= 0 and gains[1] <= 0:
            continue
        ends = [start, stop]
        if min(gains) < 0:  # the curve crosses the line here
            share = gains[0] / (gains[0] - gains[1])
            crossing = start[0] + share * (stop[0] - start[0])
            ends[0 if gains[0] < 0 else 1] = (crossing, chord(crossing))
        # One shape per area: a seam would be visible between adjacent shapes.
        if areas[-1] and areas[-1][-1] != ends[0]:
            areas.append([])
        areas[-1] += ends
    parts = [
        figures.path([*area, *((x, chord(x)) for x, _ in reversed(area))], close=True, fill=GAIN)
        for area in areas
        if area
    ]
    line = figures.line(x0, y0, x1, y1, stroke=figures.FAINT, stroke_width=1.2, stroke_dasharray="5 4")
    return [*parts, line]


def _best_label(
    x: float, y: float, left: float, width: float, top: float, beta: str, value: float
) -> list[str]:
    """Text beside the best point: above it if there is room, else below, and within the panel."""
    baseline = y - 14 if y - 26 > top - 14 else y + 24
    anchor = "start" if x < left + 60 else "end" if x > left + width - 60 else "middle"
    label = f"beta {beta}: {value:.6g}"
    return [figures.text(x, baseline, label, text_anchor=anchor, fill=figures.ORANGE, font_weight=650)]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_LABEL else "…" + text[-MAX_LABEL + 1 :]
