"""`Sweep`: betas, folders and scores, as sweep.json, CSV and table; parses --betas and names the output folders."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.figures import table
from pretrain.merge.sweeps.scoring import Metrics, format_metric

MAX_BETAS = 10_000


@dataclass
class SweepPoint:
    """One beta of a sweep.

    folder:  name of its output folder within the sweep's folder; None if the output was not kept.
    plan:    key of its merge plan.
    metrics: None until the output is scored.
    """

    beta: float
    folder: str | None
    plan: str
    metrics: Metrics | None = None


@dataclass
class Sweep:
    """The outputs and scores of a sweep over theta = beta * A + (1 - beta) * B.

    a, b:    addresses of the inputs.
    command: words of the scoring command; empty for a sweep without scores.
    metric:  the metric that decides; None before the first score.
    lower:   lower values of that metric are better.
    points:  by ascending beta.
    records: beta -> merge.json of the outputs that this call wrote or found complete; not in sweep.json.
    """

    a: str
    b: str
    command: tuple[str, ...] = ()
    metric: str | None = None
    lower: bool = False
    points: list[SweepPoint] = field(default_factory=list)
    records: dict[float, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all metrics, the one that decides first."""
        names = dict.fromkeys(name for point in self.points for name in point.metrics or ())
        first = [self.metric] if self.metric in names else []
        return [*first, *(name for name in names if name != self.metric)]

    @property
    def best(self) -> SweepPoint | None:
        """The best point; the smallest beta of equally good ones. None if no score is finite."""
        scored = [point for point in self.points if self.value(point) is not None]
        if not scored:
            return None
        sign = -1.0 if self.lower else 1.0
        return max(scored, key=lambda point: (sign * (self.value(point) or 0.0), -point.beta))

    def value(self, point: SweepPoint) -> float | None:
        """The value of the metric that decides."""
        return (point.metrics or {}).get(self.metric or "")

    def plain(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return {
            "theta": "beta * A + (1 - beta) * B",
            "A": self.a,
            "B": self.b,
            "command": list(self.command),
            "metric": self.metric,
            "lower_is_better": self.lower,
            "best": self.best.beta if self.best else None,
            "betas": [
                {
                    "beta": point.beta,
                    "folder": point.folder,
                    "plan": point.plan,
                    "figures": point.metrics,
                }
                for point in self.points
            ],
        }

    def lines(self) -> list[str]:
        """A table for the terminal: one row per beta, the best one marked."""
        header = ("beta", *self.names, "")
        parents = {0.0: f"B: {self.b}", 1.0: f"A: {self.a}"}
        rows = []
        for point in self.points:
            mark = "* best  " if point is self.best else "        "
            note = mark + parents.get(point.beta, "")
            rows.append((f"{point.beta:g}", *self._cells(point), note.rstrip()))
        width = max((len(row[-1]) for row in rows), default=0)
        return table(header, [(*row[:-1], row[-1].ljust(width)) for row in rows])

    def as_csv(self) -> str:
        """The content of sweep.csv: one row per beta, all digits of every metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("beta", "folder", *self.names))
        for point in self.points:
            cells = self._cells(point, exact=True)
            writer.writerow((repr(point.beta), point.folder or "", *cells))
        return text.getvalue()

    def _cells(self, point: SweepPoint, exact: bool = False) -> list[str]:
        """The metrics of a point in the order of `names`; empty text for one that it does not have."""
        metrics = point.metrics or {}
        return [format_metric(metrics[name], exact) if name in metrics else "" for name in self.names]


def parse_betas(text: str) -> list[float]:
    """The betas of --betas, ascending: `0:1:0.1` -> 0, 0.1, ... 1 with both ends; `0,0.25,1` -> as listed.

    Computed in decimals, so that 0.3 is the float 0.3. Raises UserError for other text and betas outside [0, 1].
    """
    try:
        if ":" not in text:
            listed = [Decimal(part) for part in text.split(",")]
            if any(beta.is_nan() for beta in listed):
                raise ValueError
            betas = set(listed)
        else:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if not step.is_finite() or step <= 0 or not last >= first:
                raise UserError(
                    f"--betas {text}: in START:STOP:STEP, STEP must be above 0 and STOP not below START"
                )
            if (last - first) / step > MAX_BETAS:
                raise UserError(f"--betas {text}: more than {MAX_BETAS} betas; choose a larger step")
            betas = {last} | {first + step * i for i in range(int((last - first) / step) + 1)}
    except (InvalidOperation, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--betas {text}: write START:STOP:STEP, such as 0:1:0.1, or a list, such as 0,0.5,1"
        ) from None
    outside = [beta for beta in betas if not 0 <= beta <= 1]
    if outside:
        raise UserError(f"--betas {text}: {outside[0]} is not between 0 and 1")
    return [float(beta) for beta in sorted(betas)]


def folder_names(betas: Sequence[float]) -> list[str]:
    """`beta-0.30` and so on: two decimals, or as many as the longest beta has."""
    places = max(2, *(-int(Decimal(repr(beta)).normalize().as_tuple().exponent) for beta in betas))
    return [f"beta-{beta:.{places}f}" for beta in betas]
