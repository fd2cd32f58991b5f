"""The comparison as a heat map in SVG: layers across, modules down, relative distance as colour.

Bars above a stack show the distance of each layer, bars on its right the distance of each module over all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.merge import figures
from pretrain.merge.diff.compare import Diff, Place, Row, grouped
from pretrain.merge.diff.distance import Distance

# CSS pixels.
WIDTH, MARGIN, LABEL_WIDTH, BAR_WIDTH = 1040.0, 28.0, 230.0, 210.0
ROW_HEIGHT, TOP, PROFILE_HEIGHT = 22.0, 92.0, 38.0
MAP_WIDTH = WIDTH - 2 * MARGIN - LABEL_WIDTH - BAR_WIDTH
MAP_LEFT, BARS_LEFT = MARGIN + LABEL_WIDTH, WIDTH - MARGIN - BAR_WIDTH + 16
EQUAL, ZERO_IN_A = "#eceef1", "#e9c8b4"  # colours of cells without a difference, and with an infinite one
MAX_LABEL = 34  # characters; longer labels lose their beginning


@dataclass(frozen=True)
class Scale:
    """Maps relative distances to 0 ... 1; logarithmic if they differ by more than a factor of 30."""

    low: float
    high: float
    logarithmic: bool

    def share(self, value: float) -> float:
        """The position of a distance on the scale."""
        if not self.high > 0:
            return 0.0
        if not self.logarithmic:
            return min(value / self.high, 1.0)
        if value <= self.low:
            return 0.0
        return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)

    def value_at(self, share: float) -> float:
        """The distance at a position; the inverse of `share`."""
        if not self.logarithmic:
            return share * self.high
        return self.low * (self.high / self.low) ** share


def picture(diff: Diff) -> str:
    """The comparison as SVG; each cell shows its measures in a tooltip."""
    rows = [(diff.places[row.name], row) for row in diff.numbers]
    stacks = list(dict.fromkeys(place.stack for place, _ in rows if place.layer is not None))
    cells = _grouped(rows, lambda place: place)
    scale = _scale([distance.relative for distance in cells.values()])
    bars = [distance.relative for distance in _grouped(rows, _over_layers).values()]
    longest = max((value for value in bars if math.isfinite(value)), default=0.0)
    parts, y = _header(diff, scale), TOP
    for stack in stacks:
        block, y = _stack(stack, rows, cells, scale, longest, y)
        parts += block
    outside = {place: distance for place, distance in cells.items() if place.layer is None}
    if outside:
        block, y = _outside(outside, scale, longest, y, bool(stacks))
        parts += block
    return figures.document(WIDTH, y + MARGIN - 14, f"{diff.a} and {diff.b}", parts)


def _grouped(rows: Sequence[tuple[Place, Row]], key: Callable[[Place], object]) -> dict:
    """Key of a place -> distance over the tensors of that key."""
    places = {row.name: place for place, row in rows}
    return grouped([row for _, row in rows], lambda row: key(places[row.name]))


def _over_layers(place: Place) -> Place:
    """One place for a module in all layers of its stack."""
    return Place(place.stack, None if place.layer is None else -1, place.part)


def _scale(values: Sequence[float]) -> Scale:
    positive = sorted(value for value in values if 0 < value < math.inf)
    if not positive:
        return Scale(0.0, 1.0 if values and max(values) > 0 else 0.0, False)
    low, high = max(positive[0], positive[-1] * 1e-4), positive[-1]
    return Scale(low, high, high / low > 30)


def _header(diff: Diff, scale: Scale) -> list[str]:
    """The title, both addresses, the total distance and the colour scale."""
    total = diff.total
    cosine = "" if total.cosine is None else f",  cosine {total.cosine:.6f}"
    summary = f"|B-A| / |A| = {figures.short(total.relative)} over {total.count:,} elements{cosine}"
    others = len(diff.only_a) + len(diff.only_b) + len(diff.reshaped)
    summary += f";  {others} tensor{'s' if others > 1 else ''} cannot be compared" if others else ""
    parts = [
        figures.text(MARGIN, 34, "How far B is from A", font_size=19, font_weight=650),
        figures.text(MARGIN, 54, f"A: {_shorten(diff.a, 50)}", fill=figures.FAINT),
        figures.text(MARGIN + LABEL_WIDTH + 130, 54, f"B: {_shorten(diff.b, 50)}", fill=figures.FAINT),
        figures.text(MARGIN, 71, summary, fill=figures.FAINT),
    ]
    if not scale.high > 0:
        verdict = "all elements are equal" if diff.rows else "no tensor to compare"
        return [*parts, figures.text(WIDTH - MARGIN, 34, verdict, text_anchor="end")]
    left, width, steps = WIDTH - MARGIN - 240, 240.0, 48
    parts += [
        figures.rect(
            left + width * i / steps, 24, width / steps + 0.4, 11, fill=figures.ramp(i / (steps - 1))
        )
        for i in range(steps)
    ]
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = figures.short(scale.value_at(share))
        parts.append(
            figures.text(
                left + width * share, 50, label, font_size=11, fill=figures.FAINT, text_anchor=anchor
            )
        )
    legend = f"relative distance{', logarithmic' if scale.logarithmic else ''}; grey: equal"
    legend += "; brown: A is 0" if any(math.isinf(row.distance.relative) for row in diff.numbers) else ""
    parts.append(figures.text(left, 18, legend, font_size=11, fill=figures.FAINT))
    return parts


def _stack(
    stack: str,
    rows: Sequence[tuple[Place, Row]],
    cells: dict[Place, Distance],
    scale: Scale,
    longest: float,
    y: float,
) -> tuple[list[str], float]:
    """One stack of layers, and the y at which the next block begins."""
    rows = [(place, row) for place, row in rows if place.stack == stack and place.layer is not None]
    inside = {p: distance for p, distance in cells.items() if p.stack == stack and p.layer is not None}
    modules = list(dict.fromkeys(place.part for place in inside))
    layers = sorted({place.layer for place in inside if place.layer is not None})
    by_module = _grouped(rows, lambda place: place.part)
    step = MAP_WIDTH / len(layers)
    gap = 1.0 if step > 5 else 0.0
    parts = [figures.text(MARGIN, y + 12, _shorten(stack or "layers", MAX_LABEL), font_weight=650)]
    parts += _profile(rows, layers, step, gap, y)
    y += 22 + PROFILE_HEIGHT + 4
    for module in modules:
        label = _shorten(module, MAX_LABEL)
        parts.append(figures.text(MAP_LEFT - 10, y + 15, label, text_anchor="end", font_size=11.5))
        for i, layer in enumerate(layers):
            distance = inside.get(Place(stack, layer, module))
            if distance is not None:
                tip = f"{module}, layer {layer}: {_tip(distance)}"
                colour = _colour(distance, scale)
                left, width = MAP_LEFT + i * step, step - gap
                parts.append(figures.rect(left, y, width, ROW_HEIGHT - 1, tip, fill=colour))
        parts += _bar(by_module[module], longest, y, module)
        y += ROW_HEIGHT
    return [*parts, *_layer_numbers(layers, step, y)], y + 34


def _profile(
    rows: Sequence[tuple[Place, Row]], layers: Sequence[int], step: float, gap: float, y: float
) -> list[str]:
    """The headings of a stack, and one bar per layer above its map: the distance over all modules of the layer."""
    by_layer = _grouped(rows, lambda place: place.layer)
    highest = max((r for distance in by_layer.values() if math.isfinite(r := distance.relative)), default=0.0)
    heading = f"per layer ({len(layers)} layers), at most {figures.short(highest)}"
    parts = [
        figures.text(MAP_LEFT, y + 12, heading, font_size=11, fill=figures.FAINT),
        figures.text(BARS_LEFT, y + 12, "over all layers", font_size=11, fill=figures.FAINT),
    ]
    bottom = y + 22 + PROFILE_HEIGHT
    for i, layer in enumerate(layers):
        distance = by_layer[layer]
        height = PROFILE_HEIGHT * _fraction(distance.relative, highest)
        tip = f"layer {layer}: {_tip(distance)}"
        left, width = MAP_LEFT + i * step, step - gap
        parts.append(figures.rect(left, bottom - height, width, height, tip, fill="#aab4c0"))
    return parts


def _layer_numbers(layers: Sequence[int], step: float, y: float) -> list[str]:
    """Layer numbers below a map, at least 26 pixels apart."""
    every = max(1, math.ceil(26 / step))
    return [
        figures.text(
            MAP_LEFT + (i + 0.5) * step,
            y + 13,
            str(layer),
            font_size=10.5,
            fill=figures.FAINT,
            text_anchor="middle",
        )
        for i, layer in enumerate(layers)
        if i % every == 0
    ]


def _outside(
    cells: dict[Place, Distance], scale: Scale, longest: float, y: float, below_stacks: bool
) -> tuple[list[str], float]:
    """One cell and one bar per module outside of layers, and the y at which the next block begins."""
    heading = "outside of layers" if below_stacks else "modules"
    parts = [figures.text(MARGIN, y + 12, heading, font_weight=650)]
    y += 22
    for place, distance in cells.items():
        label = _shorten(place.part, MAX_LABEL)
        parts.append(figures.text(MAP_LEFT - 10, y + 15, label, text_anchor="end", font_size=11.5))
        tip = f"{place.part}: {_tip(distance)}"
        parts.append(figures.rect(MAP_LEFT, y, MAP_WIDTH, ROW_HEIGHT - 1, tip, fill=_colour(distance, scale)))
        parts += _bar(distance, longest, y, place.part)
        y += ROW_HEIGHT
    return parts, y + 12


def _colour(distance: Distance, scale: Scale) -> str:
    if math.isinf(distance.relative):
        return ZERO_IN_A
    return figures.ramp(scale.share(distance.relative)) if distance.relative else EQUAL


def _bar(distance: Distance, longest: float, y: float, module: str) -> list[str]:
    """The bar of a module on the right, with its relative distance beside it."""
    finite = math.isfinite(distance.relative)
    width = (BAR_WIDTH - 76) * _fraction(distance.relative, longest) if finite else 0.0
    width = max(width, 0.6)  # a distance of 0 is visible too
    tip = f"{module}: {_tip(distance)}"
    return [
        figures.rect(BARS_LEFT, y + 4, width, ROW_HEIGHT - 9, tip, fill=figures.BLUE, rx=1.5),
        figures.text(BARS_LEFT + width + 6, y + 15, _relative(distance), font_size=11, fill=figures.FAINT),
    ]


def _fraction(value: float, highest: float) -> float:
    return min(value / highest, 1.0) if 0 < highest < math.inf else 0.0


def _relative(distance: Distance) -> str:
    return figures.short(distance.relative) if math.isfinite(distance.relative) else "A is 0"


def _tip(distance: Distance) -> str:
    """The tooltip: all measures of a distance."""
    cosine = "-" if distance.cosine is None else f"{distance.cosine:.6f}"
    return (
        f"|B-A|/|A| {_relative(distance)}, cosine {cosine}, max |B-A| {figures.short(distance.max_abs)}, "
        f"same sign {distance.sign_agreement:.2%}, equal {distance.equal_share:.2%}, {distance.count:,} elements"
    )


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else "…" + text[-characters + 1 :]
