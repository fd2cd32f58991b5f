"""`Sweep`: betas, folders, scores; sweep.json, CSV, table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.figures import table
from pretrain.merge.sweeps.scoring import Figures


@dataclass
class Scored:
    """One beta of a sweep.

    folder:  name of its output in the sweep's folder; None where it was not kept.
    plan:    key of its merge.
    figures: None until it is scored.
    """

    beta: float
    folder: str | None
    plan: str
    figures: Figures | None = None


@dataclass
class Sweep:
    """A sweep's outputs and figures.

    a, b:    addresses; theta = beta * A + (1 - beta) * B.
    command: that scored; empty for a sweep without.
    metric:  the figure that decides; None before the first score.
    lower:   whether less of it is better.
    records: of what this call merged or found merged, by beta; not in sweep.json.
    """

    a: str
    b: str
    command: tuple[str, ...] = ()
    metric: str | None = None
    lower: bool = False
    betas: list[Scored] = field(default_factory=list)
    records: dict[float, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every figure, the one that decides first."""
        found = dict.fromkeys(name for one in self.betas for name in one.figures or ())
        first = [self.metric] if self.metric in found else []
        return [*first, *(name for name in found if name != self.metric)]

    @property
    def best(self) -> Scored | None:
        """The best beta; of equals the smallest."""
        scored = [one for one in self.betas if self.value(one) is not None]
        if not scored:
            return None
        sign = -1.0 if self.lower else 1.0
        return max(scored, key=lambda one: (sign * (self.value(one) or 0.0), -one.beta))

    def value(self, one: Scored) -> float | None:
        """Of the figure that decides."""
        return (one.figures or {}).get(self.metric or "")

    def plain(self) -> dict[str, Any]:
        """As sweep.json has it."""
        return {
            "theta": "beta * A + (1 - beta) * B",
            "A": self.a,
            "B": self.b,
            "command": list(self.command),
            "metric": self.metric,
            "lower_is_better": self.lower,
            "best": self.best.beta if self.best else None,
            "betas": [
                {"beta": one.beta, "folder": one.folder, "plan": one.plan, "figures": one.figures}
                for one in self.betas
            ],
        }

    def lines(self) -> list[str]:
        """A row a beta, the best one marked."""
        heads = ("beta", *self.names, "")
        notes = {0.0: f"B: {self.b}", 1.0: f"A: {self.a}"}
        rows = []
        for one in self.betas:
            cells = [_shown((one.figures or {}).get(name, ""), "nan") for name in self.names]
            note = ("* best  " if one is self.best else "        ") + notes.get(one.beta, "")
            rows.append((f"{one.beta:g}", *cells, note.rstrip()))
        width = max((len(row[-1]) for row in rows), default=0)
        return table(heads, [(*row[:-1], row[-1].ljust(width)) for row in rows])

    def as_csv(self) -> str:
        made = io.StringIO()
        writer = csv.writer(made, lineterminator="\n")
        writer.writerow(("beta", "folder", *self.names))
        for one in self.betas:
            cells = [_shown((one.figures or {}).get(name, ""), "nan", exact=True) for name in self.names]
            writer.writerow((repr(one.beta), one.folder or "", *cells))
        return made.getvalue()


def _shown(value: float | str | None, none: str, exact: bool = False) -> str:
    if value is None:
        return none
    if isinstance(value, str):
        return value
    return repr(value) if exact else f"{value:.6g}"


def parse_betas(text: str) -> list[float]:
    """`0:1:0.1` -> 0, 0.1, ... 1, both ends included; `0,0.25,1` -> as listed. Exact decimals, ascending."""
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
                    f"--betas {text}: START:STOP:STEP with a step above 0 and STOP not below START"
                )
            if (last - first) / step > 10_000:
                raise UserError(f"--betas {text}: more than 10000 betas; take a larger step")
            betas = {last} | {first + step * i for i in range(int((last - first) / step) + 1)}
    except (InvalidOperation, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--betas {text}: write START:STOP:STEP, such as 0:1:0.1, or a list, 0,0.5,1"
        ) from None
    wrong = [beta for beta in betas if not 0 <= beta <= 1]
    if wrong:
        raise UserError(f"--betas {text}: {wrong[0]} is not between 0 and 1")
    return [float(beta) for beta in sorted(betas)]


def folder_names(betas: Sequence[float]) -> list[str]:
    """`beta-0.30`: two decimals, more where a beta needs them to be told apart."""
    places = max(2, *(-int(Decimal(repr(beta)).normalize().as_tuple().exponent) for beta in betas))
    return [f"beta-{beta:.{places}f}" for beta in betas]
