"""A sweep whose outputs are scored by a person's command: figures by beta, kept as they come, shown when done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.files import exists, join
from pretrain.merge.execute import check_apart, execute
from pretrain.merge.merge_plan import Plan
from pretrain.merge.output.record import RECORD
from pretrain.merge.output.writer import Progress
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.sweeps.results import Scored, Sweep, _shown, folder_names
from pretrain.merge.sweeps.scoring import Command, metric_of, telling
from pretrain.merge.sweeps.workspace import Workplace, discard
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK

RESULTS = "sweep.json"


def run_sweep(
    plans: Sequence[Plan],
    opened: OpenedInputs,
    betas: Sequence[float],
    out: Path | str,
    command: Command | None = None,
    *,
    keep: bool = True,
    metric: str | None = None,
    lower: bool | None = None,
    chunk: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Sweep:
    """Carry out the plans of `plan_sweep`, one a beta, and score each output; goes on where an earlier call stopped.

    keep: write all in one pass over the inputs, and leave them; else one is there at a time, until it is scored.
    out:  a folder on a disk, or in a store. Of outputs in a store the command gets the same bytes on a disk, merged
          once more into a folder below TMPDIR, one at a time.
    told: is told each score as it comes.
    Raises UserError when the command fails on one (what was scored stays), and when `out` holds another sweep.
    """
    if not keep and command is None:
        raise UserError("--no-keep is for sweeps that are scored: say how with --eval-cmd")
    prints = [source.hashes() for source in opened.sources]
    keys = [plan.key(prints) for plan in plans]
    check_apart(str(out), opened)
    tell = telling(told)
    with Workplace(str(out), "\n".join(keys)) as place:
        sweep = _resumed(plans, keys, betas, place, command, metric, lower)
        wanted = [next(one for one in sweep.betas if one.beta == beta) for beta in betas]
        for one in wanted:
            if one.folder is not None and not exists(join(place.url, f"{one.folder}/{RECORD}")):
                one.folder = None  # removed by hand
        names = [one.folder or name for one, name in zip(wanted, folder_names(betas), strict=True)]
        if keep:
            folders = [join(place.url, name) for name in names]
            made = execute(plans, opened, folders, chunk=chunk, threads=threads, progress=progress)
            sweep.records = dict(zip(betas, made, strict=True))
            for one, name in zip(wanted, names, strict=True):
                one.folder = name
        if keep or place.remote:  # a store that may not be written is found before hours of scoring
            _save(sweep, place)
        for plan, one, name in zip(plans, wanted, names, strict=True):
            passing = place.remote or one.folder is None
            trial = place.folder / (name if passing else one.folder or name)
            if command is not None and one.figures is None:
                if passing:
                    made = execute([plan], opened, [trial], chunk=chunk, threads=threads, progress=progress)
                    sweep.records[one.beta] = made[0]
                one.figures = place.score(command, trial, trial.name)
                sweep.metric = metric_of(one.figures, metric or sweep.metric)
                _save(sweep, place)
                tell(_said(sweep, one), sweep.metric, sweep.lower)
            if passing:
                discard(trial)
        if command is not None:
            _show(sweep, place)
        return sweep


def _resumed(
    plans: Sequence[Plan],
    keys: Sequence[str],
    betas: Sequence[float],
    place: Workplace,
    command: Command | None,
    metric: str | None,
    lower: bool | None,
) -> Sweep:
    """The sweep as sweep.json knows it, with a place for every beta."""
    words = command.words if command is not None else ()
    a, b = plans[0].addresses[:2]
    sweep = Sweep(a, b, words, metric, bool(lower))
    earlier = _read(place)
    if not any(one.figures for one in earlier.betas):
        earlier.command = ()  # nothing hangs on a command that never gave a figure
    if earlier.command and words and earlier.command != words:
        raise UserError(
            f"{join(place.url, RESULTS)}: scored by another command, {' '.join(earlier.command)}: its figures "
            "cannot stand beside those of this one; choose another --out, or delete that file to score again"
        )
    if not words:
        sweep.command, sweep.metric, sweep.lower = earlier.command, earlier.metric, earlier.lower
    elif metric in (None, earlier.metric):
        sweep.metric, sweep.lower = earlier.metric, earlier.lower if lower is None else lower
    scored = [one.figures for one in earlier.betas if one.figures]
    if metric is not None and scored and not any(metric in figures for figures in scored):
        metric_of(scored[0], metric)
    known = {one.beta: one for one in earlier.betas}
    for key, beta in zip(keys, betas, strict=True):
        one = known.setdefault(beta, Scored(beta, None, key))
        if one.plan != key:
            there = "" if (earlier.a, earlier.b) == (a, b) else f": A is {earlier.a} there, and B {earlier.b}"
            raise UserError(
                f"{place.url}: holds a sweep of other weights or options (beta {beta:g}){there}; choose another --out, "
                "or remove it"
            )
    sweep.betas = [known[beta] for beta in sorted(known)]
    return sweep


def _read(place: Workplace) -> Sweep:
    """sweep.json; an empty sweep where there is none."""
    raw = place.read(RESULTS)
    if raw is None:
        return Sweep("", "")
    try:
        content = json.loads(raw)
        return Sweep(
            content["A"],
            content["B"],
            tuple(content["command"]),
            content["metric"],
            bool(content["lower_is_better"]),
            [Scored(e["beta"], e["folder"], e["plan"], e["figures"]) for e in content["betas"]],
        )
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f"{join(place.url, RESULTS)}: not what a sweep writes; choose another --out, or delete that file"
        ) from None


def _save(sweep: Sweep, place: Workplace) -> None:
    place.publish(RESULTS, json.dumps(sweep.plain(), indent=1) + "\n")


def _show(sweep: Sweep, place: Workplace) -> None:
    from pretrain.merge.sweeps.chart import picture

    place.publish("sweep.csv", sweep.as_csv())
    place.publish("sweep.svg", picture(sweep))


def _said(sweep: Sweep, one: Scored) -> str:
    figures = one.figures or {}
    return f"beta {one.beta:g}: " + ", ".join(
        f"{name} {_shown(value, 'nan')}" for name, value in figures.items()
    )
