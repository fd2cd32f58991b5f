"""A sweep whose outputs are scored by a person's command: figures by beta, kept as they come, shown when done."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import publish
from pretrain.lock import FolderLock
from pretrain.merge.betas import folder_names
from pretrain.merge.diff import table
from pretrain.merge.kernels import BLOCK
from pretrain.merge.plan import Plan
from pretrain.merge.prepare import Opened
from pretrain.merge.score import Command, Figures, metric_of, on_disk, score
from pretrain.merge.tool import RECORD, execute
from pretrain.merge.writer import Progress

RESULTS, LOGS = "sweep.json", "logs"


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
    """

    a: str
    b: str
    command: tuple[str, ...] = ()
    metric: str | None = None
    lower: bool = False
    betas: list[Scored] = field(default_factory=list)

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


def run_sweep(
    plans: Sequence[Plan],
    opened: Opened,
    betas: Sequence[float],
    out: Path,
    command: Command | None = None,
    *,
    keep: bool = True,
    metric: str | None = None,
    lower: bool = False,
    chunk: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Sweep:
    """Carry out the plans of `plan_sweep`, one a beta, and score each output; goes on where an earlier call stopped.

    keep: write all in one pass over the inputs, and leave them; else one is there at a time, until it is scored.
    told: is told each score as it comes.
    Raises UserError when the command fails on one (what was scored stays), and when `out` holds another sweep.
    """
    if not keep and command is None:
        raise UserError("--no-keep is for sweeps that are scored: say how with --eval-cmd")
    on_disk(out)
    lock = FolderLock(out, wait=0, where="--out")
    try:
        sweep = _resumed(plans, opened, betas, out, command, metric, lower)
        wanted = [next(one for one in sweep.betas if one.beta == beta) for beta in betas]
        names = folder_names(betas)
        if keep:
            execute(
                plans, opened, [out / name for name in names], chunk=chunk, threads=threads, progress=progress
            )
            for one, name in zip(wanted, names, strict=True):
                one.folder = name
            _save(sweep, out)
        for plan, one, name in zip(plans, wanted, names, strict=True):
            if command is not None and one.figures is None:
                if one.folder is None:
                    execute([plan], opened, [out / name], chunk=chunk, threads=threads, progress=progress)
                _score(sweep, one, command, out, one.folder or name, metric)
                if told is not None:
                    told(_said(sweep, one))
            if one.folder is None and (out / name / RECORD).is_file():
                shutil.rmtree(out / name)
        if command is not None:
            _show(sweep, out)
        return sweep
    finally:
        lock.release()


def _resumed(
    plans: Sequence[Plan],
    opened: Opened,
    betas: Sequence[float],
    out: Path,
    command: Command | None,
    metric: str | None,
    lower: bool,
) -> Sweep:
    """The sweep as sweep.json knows it, with a place for every beta."""
    prints = [source.hashes() for source in opened.sources]
    words = command.words if command is not None else ()
    a, b = plans[0].addresses[:2]
    sweep = Sweep(a, b, words, metric, lower)
    earlier = _read(out / RESULTS)
    if not any(one.figures for one in earlier.betas):
        earlier.command = ()  # nothing hangs on a command that never gave a figure
    if earlier.command and words and earlier.command != words:
        raise UserError(
            f"{out / RESULTS}: scored by another command, {' '.join(earlier.command)}: its figures cannot stand beside "
            "those of this one; choose another --out, or delete that file to score again"
        )
    if not words:
        sweep.command, sweep.metric, sweep.lower = earlier.command, earlier.metric, earlier.lower
    elif metric is None:
        sweep.metric = earlier.metric
    known = {one.beta: one for one in earlier.betas}
    for plan, beta in zip(plans, betas, strict=True):
        key = plan.key(prints)
        one = known.setdefault(beta, Scored(beta, None, key))
        if one.plan != key:
            raise UserError(
                f"{out}: holds a sweep of other weights or options (beta {beta:g}); choose another --out, or remove it"
            )
    sweep.betas = [known[beta] for beta in sorted(known)]
    return sweep


def _read(path: Path) -> Sweep:
    """sweep.json; an empty sweep where there is none."""
    if not path.is_file():
        return Sweep("", "")
    try:
        content = json.loads(path.read_text())
        return Sweep(
            content["A"],
            content["B"],
            tuple(content["command"]),
            content["metric"],
            bool(content["lower_is_better"]),
            [Scored(e["beta"], e["folder"], e["plan"], e["figures"]) for e in content["betas"]],
        )
    except (OSError, LookupError, TypeError, ValueError):
        raise UserError(
            f"{path}: not what a sweep writes; choose another --out, or delete that file"
        ) from None


def _save(sweep: Sweep, out: Path) -> None:
    publish(out / RESULTS, (json.dumps(sweep.plain(), indent=1) + "\n").encode())


def _score(sweep: Sweep, one: Scored, command: Command, out: Path, name: str, metric: str | None) -> None:
    figures = score(command, out / name, out / LOGS / name)
    sweep.metric = metric_of(figures, metric or sweep.metric)
    one.figures = figures
    _save(sweep, out)


def _show(sweep: Sweep, out: Path) -> None:
    from pretrain.merge.curve import picture

    publish(out / "sweep.csv", sweep.as_csv().encode())
    publish(out / "sweep.svg", picture(sweep).encode())


def _said(sweep: Sweep, one: Scored) -> str:
    figures = one.figures or {}
    return f"beta {one.beta:g}: " + ", ".join(
        f"{name} {_shown(value, 'nan')}" for name, value in figures.items()
    )


def _shown(value: float | str | None, none: str, exact: bool = False) -> str:
    if value is None:
        return none
    if isinstance(value, str):
        return value
    return repr(value) if exact else f"{value:.6g}"
