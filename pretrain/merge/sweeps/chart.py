"""The curve of a sweep as a picture: figures over beta, the straight line between the parents, the best one marked."""

from __future__ import annotations

from itertools import pairwise

from pretrain.merge import figures
from pretrain.merge.sweeps.results import Sweep

WIDTH, MARGIN = 860.0, 28.0
HEAD, TALL, SMALL = 74.0, 330.0, 150.0
GAIN = "#e7f0fa"
Point = tuple[float, float]


def picture(sweep: Sweep) -> str:
    """The figure that decides, large; the others below it, two side by side, an odd one across."""
    names = sweep.names
    parts = _heading(sweep)
    if not names:
        return figures.document(WIDTH, HEAD + MARGIN, "sweep", parts)
    y = HEAD
    parts += _panel(sweep, names[0], (MARGIN, y), (WIDTH - 2 * MARGIN, TALL), True)
    y += TALL + 62
    half = (WIDTH - 3 * MARGIN) / 2
    for number, name in enumerate(names[1:]):
        last = number == len(names) - 2
        left = MARGIN + (number % 2) * (half + MARGIN)
        width = WIDTH - 2 * MARGIN if last and number % 2 == 0 else half
        parts += _panel(sweep, name, (left, y), (width, SMALL), False)
        if number % 2 or last:
            y += SMALL + 56
    return figures.document(WIDTH, y - 6, f"sweep between {sweep.b} and {sweep.a}", parts)


def _heading(sweep: Sweep) -> list[str]:
    better = "less is better" if sweep.lower else "more is better"
    parts = [figures.text(MARGIN, 34, "beta x A + (1 - beta) x B", font_size=19, font_weight=650)]
    best = sweep.best
    if best is None:
        return parts
    said = f"best: beta {best.beta:g}, {sweep.metric} {sweep.value(best):.6g}{_gain(sweep)}; {better}"
    return [*parts, figures.text(MARGIN, 54, said, fill=figures.FAINT)]


def _gain(sweep: Sweep) -> str:
    """What the best beta has over the better parent."""
    ends = [v for one in sweep.betas if one.beta in (0, 1) and (v := sweep.value(one)) is not None]
    best = sweep.value(sweep.best) if sweep.best is not None else None
    if best is None or len(ends) < 2:
        return ""
    parent = min(ends) if sweep.lower else max(ends)
    if best == parent:
        return " (no mix is better than the better parent)"
    return f" ({best - parent:+.3g} against the better parent)"


def _panel(sweep: Sweep, name: str, corner: Point, size: Point, large: bool) -> list[str]:
    """One figure over beta."""
    values = {one.beta: v for one in sweep.betas if (v := (one.figures or {}).get(name)) is not None}
    left, top = corner[0] + 58, corner[1] + 24
    width, height = size[0] - 58 - 14, size[1] - 24
    parts = [figures.text(corner[0], corner[1] + 8, name, font_weight=650, font_size=13 if large else 12)]
    if not values:
        return [*parts, figures.text(left, top + 20, "nothing finite", fill=figures.FAINT)]
    marks = figures.ticks(min(values.values()), max(values.values()), 6 if large else 3)
    low, high = marks[0], marks[-1]

    def at(beta: float, value: float) -> Point:
        return left + beta * width, top + height * (1 - (value - low) / (high - low))

    for mark in marks:
        y = at(0, mark)[1]
        parts.append(figures.line(left, y, left + width, y))
        parts.append(
            figures.text(left - 8, y + 4, f"{mark:.6g}", text_anchor="end", font_size=11, fill=figures.FAINT)
        )
    for beta in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x = at(beta, low)[0]
        parts.append(figures.line(x, top + height, x, top + height + 4, stroke=figures.FAINT))
        label = figures.text(
            x, top + height + 17, f"{beta:g}", text_anchor="middle", font_size=11, fill=figures.FAINT
        )
        parts.append(label)
    points = [at(beta, value) for beta, value in sorted(values.items())]
    if 0.0 in values and 1.0 in values:
        parts += _chord(points, sweep.lower, large)
    for run in _runs(sweep, values):
        line = [at(beta, values[beta]) for beta in run]
        parts.append(
            figures.path(
                line, stroke=figures.BLUE, stroke_width=2.2 if large else 1.6, stroke_linejoin="round"
            )
        )
    parts += [
        figures.circle(*at(b, v), 3.6 if large else 2.4, f"beta {b:g}: {v:.8g}", fill=figures.BLUE)
        for b, v in values.items()
    ]
    best = sweep.best
    if best is not None and best.beta in values:
        x, y = at(best.beta, values[best.beta])
        parts.append(
            figures.circle(x, y, 8 if large else 5.5, fill="none", stroke=figures.ORANGE, stroke_width=2)
        )
        if large:
            parts += _label(x, y, left, width, top, f"{best.beta:g}", values[best.beta])
    if large:
        y = top + height + 36
        parts.append(figures.text(left, y, f"B  {_cut(sweep.b)}", fill=figures.INK))
        parts.append(
            figures.text(left + width, y, f"A  {_cut(sweep.a)}", text_anchor="end", fill=figures.INK)
        )
        parts.append(figures.text(left + width / 2, y, "beta", text_anchor="middle", fill=figures.FAINT))
    return parts


def _runs(sweep: Sweep, values: dict[float, float]) -> list[list[float]]:
    """Betas one after another that all have the figure: between those runs the curve is broken."""
    runs: list[list[float]] = [[]]
    for one in sweep.betas:
        if one.beta in values:
            runs[-1].append(one.beta)
        elif one.figures is not None:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _chord(points: list[Point], lower: bool, shaded: bool) -> list[str]:
    """The straight line between the parents; `shaded` where the curve is better than it."""
    (x0, y0), (x1, y1) = points[0], points[-1]

    def chord(x: float) -> float:
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    sign = 1.0 if lower else -1.0  # y grows downwards
    areas: list[list[Point]] = [[]]
    for one, other in pairwise(points) if shaded else ():
        gains = [sign * (y - chord(x)) for x, y in (one, other)]
        if gains[0] <= 0 and gains[1] <= 0:
            continue
        ends = [one, other]
        if min(gains) < 0:  # the curve crosses the line here
            share = gains[0] / (gains[0] - gains[1])
            cross = one[0] + share * (other[0] - one[0])
            ends[0 if gains[0] < 0 else 1] = (cross, chord(cross))
        if (
            areas[-1] and areas[-1][-1] != ends[0]
        ):  # one shape as far as it goes: between two a seam would show
            areas.append([])
        areas[-1] += ends
    parts = [
        figures.path([*area, *((x, chord(x)) for x, _ in reversed(area))], close=True, fill=GAIN)
        for area in areas
        if area
    ]
    line = figures.line(x0, y0, x1, y1, stroke=figures.FAINT, stroke_width=1.2, stroke_dasharray="5 4")
    return [*parts, line]


def _label(x: float, y: float, left: float, width: float, top: float, beta: str, value: float) -> list[str]:
    """Beside the best point, on the side that has room."""
    above = y - 14 if y - 26 > top - 14 else y + 24
    anchor = "start" if x < left + 60 else "end" if x > left + width - 60 else "middle"
    said = f"beta {beta}: {value:.6g}"
    return [figures.text(x, above, said, text_anchor=anchor, fill=figures.ORANGE, font_weight=650)]


def _cut(text: str) -> str:
    return text if len(text) <= 44 else "…" + text[-43:]
