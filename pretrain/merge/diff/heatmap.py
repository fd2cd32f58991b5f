"""A comparison as a picture: layers across, modules down, relative distance as colour; sums as bars on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.merge import figures
from pretrain.merge.diff.compare import Diff, Place, Row, grouped
from pretrain.merge.diff.distance import Distance

WIDTH, MARGIN, LABELS, BARS = 1040.0, 28.0, 230.0, 210.0
ROW, TOP = 22.0, 92.0
MAP = WIDTH - 2 * MARGIN - LABELS - BARS
EQUAL, NONE = "#eceef1", "#e9c8b4"
LETTERS = 34  # of a label; longer ones lose their beginning


@dataclass(frozen=True)
class Scale:
    """Relative distance -> 0 to 1, by its logarithm where cells differ by more than 30 times."""

    low: float
    high: float
    logarithmic: bool

    def share(self, value: float) -> float:
        if not self.high > 0:
            return 0.0
        if not self.logarithmic:
            return min(value / self.high, 1.0)
        if value <= self.low:
            return 0.0
        return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)

    def at(self, share: float) -> float:
        if not self.logarithmic:
            return share * self.high
        return self.low * (self.high / self.low) ** share


def picture(found: Diff) -> str:
    """The comparison as SVG; the pointer over a cell shows its figures."""
    rows = [(found.places[row.name], row) for row in found.numbers]
    stacks = list(dict.fromkeys(place.stack for place, _ in rows if place.layer is not None))
    cells = grouped_by(rows, lambda place: place)
    scale = _scale([one.relative for one in cells.values()])
    sums = [one.relative for one in grouped_by(rows, _across).values()]
    most = max((value for value in sums if math.isfinite(value)), default=0.0)
    parts, y = _heading(found, scale), TOP
    for stack in stacks:
        inside = {
            place: one for place, one in cells.items() if place.stack == stack and place.layer is not None
        }
        block, y = _stack(stack, inside, rows, scale, most, y)
        parts += block
    outside = {place: one for place, one in cells.items() if place.layer is None}
    if outside:
        block, y = _outside(outside, scale, most, y, bool(stacks))
        parts += block
    return figures.document(WIDTH, y + MARGIN - 14, f"{found.a} and {found.b}", parts)


def grouped_by(rows: Sequence[tuple[Place, Row]], key: Callable[[Place], object]) -> dict:
    places = {row.name: place for place, row in rows}
    return grouped([row for _, row in rows], lambda row: key(places[row.name]))


def _across(place: Place) -> Place:
    """The same module over all layers of its stack."""
    return Place(place.stack, None if place.layer is None else -1, place.part)


def _scale(values: Sequence[float]) -> Scale:
    found = sorted(value for value in values if 0 < value < math.inf)
    if not found:
        return Scale(0.0, 1.0 if values and max(values) > 0 else 0.0, False)
    low, high = max(found[0], found[-1] * 1e-4), found[-1]
    return Scale(low, high, high / low > 30)


def _heading(found: Diff, scale: Scale) -> list[str]:
    whole = found.total
    cosine = "" if whole.cosine is None else f",  cosine {whole.cosine:.6f}"
    said = f"|B-A| / |A| = {figures.short(whole.relative)} over {whole.count:,} elements{cosine}"
    others = len(found.only_a) + len(found.only_b) + len(found.reshaped)
    said += f";  {others} tensor{'s' if others > 1 else ''} cannot be compared" if others else ""
    parts = [
        figures.text(MARGIN, 34, "How far B is from A", font_size=19, font_weight=650),
        figures.text(MARGIN, 54, f"A: {_cut(found.a, 50)}", fill=figures.FAINT),
        figures.text(MARGIN + LABELS + 130, 54, f"B: {_cut(found.b, 50)}", fill=figures.FAINT),
        figures.text(MARGIN, 71, said, fill=figures.FAINT),
    ]
    if not scale.high > 0:
        verdict = "all elements are equal" if found.rows else "no tensor to compare"
        return [*parts, figures.text(WIDTH - MARGIN, 34, verdict, text_anchor="end")]
    left, width, steps = WIDTH - MARGIN - 240, 240.0, 48
    parts += [
        figures.rect(
            left + width * i / steps, 24, width / steps + 0.4, 11, fill=figures.ramp(i / (steps - 1))
        )
        for i in range(steps)
    ]
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = figures.short(scale.at(share))
        parts.append(
            figures.text(
                left + width * share, 50, label, font_size=11, fill=figures.FAINT, text_anchor=anchor
            )
        )
    kind = f"relative distance{', logarithmic' if scale.logarithmic else ''}; grey: equal"
    kind += "; brown: A is 0" if any(math.isinf(row.distance.relative) for row in found.numbers) else ""
    parts.append(figures.text(left, 18, kind, font_size=11, fill=figures.FAINT))
    return parts


def _stack(
    stack: str,
    cells: dict[Place, Distance],
    rows: Sequence[tuple[Place, Row]],
    scale: Scale,
    most: float,
    y: float,
) -> tuple[list[str], float]:
    """One stack of layers, and where the next block begins."""
    parts = list(dict.fromkeys(place.part for place in cells))
    layers = sorted({place.layer for place in cells if place.layer is not None})
    inside = [(place, row) for place, row in rows if place.stack == stack and place.layer is not None]
    by_layer = grouped_by(inside, lambda place: place.layer)
    by_part = grouped_by(inside, lambda place: place.part)
    left, step = MARGIN + LABELS, MAP / len(layers)
    gap = 1.0 if step > 5 else 0.0
    drawn = [figures.text(MARGIN, y + 12, _cut(stack or "layers", LETTERS), font_weight=650)]
    highest = max((r for one in by_layer.values() if math.isfinite(r := one.relative)), default=0.0)
    said = f"layer by layer, {len(layers)} of them, up to {figures.short(highest)}"
    drawn.append(figures.text(left, y + 12, said, font_size=11, fill=figures.FAINT))
    drawn.append(
        figures.text(WIDTH - MARGIN - BARS + 16, y + 12, "over all layers", font_size=11, fill=figures.FAINT)
    )
    profile, y = 38.0, y + 22
    for i, layer in enumerate(layers):
        one = by_layer[layer]
        height = profile * _part_of(one.relative, highest)
        tip = f"layer {layer}: {_tip(one)}"
        drawn.append(
            figures.rect(left + i * step, y + profile - height, step - gap, height, tip, fill="#aab4c0")
        )
    y += profile + 4
    for j, part in enumerate(parts):
        top = y + j * ROW
        drawn.append(
            figures.text(left - 10, top + 15, _cut(part, LETTERS), text_anchor="end", font_size=11.5)
        )
        for i, layer in enumerate(layers):
            place = Place(stack, layer, part)
            if place in cells:
                tip = f"{part}, layer {layer}: {_tip(cells[place])}"
                colour = _colour(cells[place], scale)
                drawn.append(figures.rect(left + i * step, top, step - gap, ROW - 1, tip, fill=colour))
        drawn += _bar(by_part[part], scale, most, top, part)
    y += len(parts) * ROW
    every = max(1, math.ceil(26 / step))
    drawn += [
        figures.text(
            left + (i + 0.5) * step,
            y + 13,
            str(layer),
            font_size=10.5,
            fill=figures.FAINT,
            text_anchor="middle",
        )
        for i, layer in enumerate(layers)
        if i % every == 0
    ]
    return drawn, y + 34


def _outside(
    cells: dict[Place, Distance], scale: Scale, most: float, y: float, below: bool
) -> tuple[list[str], float]:
    """Modules that are in no layer: one cell and one bar each."""
    drawn = [figures.text(MARGIN, y + 12, "outside of layers" if below else "modules", font_weight=650)]
    y += 22
    left = MARGIN + LABELS
    for place, one in cells.items():
        label = _cut(place.part, LETTERS)
        drawn.append(figures.text(left - 10, y + 15, label, text_anchor="end", font_size=11.5))
        colour = _colour(one, scale)
        drawn.append(figures.rect(left, y, MAP, ROW - 1, f"{place.part}: {_tip(one)}", fill=colour))
        drawn += _bar(one, scale, most, y, place.part)
        y += ROW
    return drawn, y + 12


def _colour(one: Distance, scale: Scale) -> str:
    if math.isinf(one.relative):
        return NONE
    return figures.ramp(scale.share(one.relative)) if one.relative else EQUAL


def _bar(one: Distance, scale: Scale, most: float, top: float, part: str) -> list[str]:
    left, room = WIDTH - MARGIN - BARS + 16, BARS - 76
    width = room * _part_of(one.relative, most) if math.isfinite(one.relative) else 0.0
    return [
        figures.rect(
            left, top + 4, max(width, 0.6), ROW - 9, f"{part}: {_tip(one)}", fill=figures.BLUE, rx=1.5
        ),
        figures.text(left + max(width, 0.6) + 6, top + 15, _figure(one), font_size=11, fill=figures.FAINT),
    ]


def _part_of(value: float, most: float) -> float:
    return min(value / most, 1.0) if 0 < most < math.inf else 0.0


def _figure(one: Distance) -> str:
    return figures.short(one.relative) if math.isfinite(one.relative) else "A is 0"


def _tip(one: Distance) -> str:
    cosine = "-" if one.cosine is None else f"{one.cosine:.6f}"
    return (
        f"|B-A|/|A| {_figure(one)}, cosine {cosine}, max |B-A| {figures.short(one.max_abs)}, "
        f"same sign {one.sign_agreement:.2%}, equal {one.equal_share:.2%}, {one.count:,} elements"
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else "…" + text[-letters + 1 :]
