"""SVG drawing for the charts of the merge tool: shapes, round axis ticks, a colour ramp; and a plain-text table.

An SVG loads no other file, script or font. All text and attributes are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
INK, FAINT, RULE, PAPER = "#1b1f24", "#66707b", "#e3e7ec", "#ffffff"
BLUE, ORANGE = "#2463a6", "#c8541a"
# Light to dark in visually equal steps, also in grey print; after ColorBrewer's YlGnBu.
RAMP = ("#f7fbf0", "#d9f0c9", "#a6dbb9", "#63c0c1", "#3199be", "#2467a8", "#1c3c7d", "#0b1f4f")


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A complete SVG document of `width` x `height` CSS pixels."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" style="max-width:100%;height:auto" font-family="{FONT}" font-size="12" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, content: str, **style: str | float) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{_style({"fill": INK, **style})}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, **style: str | float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f"<line {ends}{_style({'stroke': RULE, **style})}/>"


def rect(x: float, y: float, width: float, height: float, tip: str = "", **style: str | float) -> str:
    """A rectangle; `tip` is its tooltip."""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return _tipped("rect", f"{box}{_style(style)}", tip)


def circle(x: float, y: float, radius: float, tip: str = "", **style: str | float) -> str:
    return _tipped("circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"{_style(style)}', tip)


def path(points: Sequence[tuple[float, float]], close: bool = False, **style: str | float) -> str:
    """Straight lines through the points; `close` joins the last point to the first."""
    if not points:
        return ""
    steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}{" Z" if close else ""}"{_style({"fill": "none", **style})}/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` evenly spaced round numbers; the first is at most `low`, the last at least `high`."""
    if not high > low:  # a flat curve: 5 % above and below it
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]


def ramp(share: float) -> str:
    """The colour of a share from 0 (light) to 1 (dark), interpolated between the colours of RAMP."""
    position = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(position), len(RAMP) - 2)
    lighter, darker = _rgb(RAMP[index]), _rgb(RAMP[index + 1])
    mixed = (round(a + (b - a) * (position - index)) for a, b in zip(lighter, darker, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def short(value: float) -> str:
    """A number with three significant digits: 0.0123, 1.2e-05, 12.5."""
    return f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text lines: the first column is left-aligned, all others are right-aligned."""
    all_rows = [header, *rows]
    widths = [max(len(row[i]) for row in all_rows) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in all_rows
    ]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _style(style: dict[str, str | float]) -> str:
    return "".join(f" {name.replace('_', '-')}={quoteattr(str(value))}" for name, value in style.items())


def _tipped(kind: str, attributes: str, tip: str) -> str:
    return f"<{kind} {attributes}><title>{escape(tip)}</title></{kind}>" if tip else f"<{kind} {attributes}/>"
