"""Runs a sweep and scores each output with the user's command; resumable.

sweep.json is published after every score, so that a killed or failed sweep resumes with the outputs that have no score.
At the end sweep.csv and sweep.svg show the metrics over beta.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.files import exists, join
from pretrain.merge.execute import check_outside_inputs, execute
from pretrain.merge.merge_plan import Plan
from pretrain.merge.output.record import RECORD
from pretrain.merge.output.writer import Progress
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.sweeps.results import Sweep, SweepPoint, folder_names
from pretrain.merge.sweeps.scoring import Command, choose_metric, format_metrics, score_reporter
from pretrain.merge.sweeps.workspace import Workspace, discard
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
    print_line: Callable[[str], None] | None = None,
) -> Sweep:
    """Execute the plans of `plan_sweep`, one per beta, and score each output; resumes where an earlier call stopped.

    out:        a folder on a disk or in a store. For a store, each output is merged once more into a folder below
                TMPDIR, one at a time and with the same bytes, because the command needs local files.
    keep:       write all outputs in one pass over the inputs, and keep them. Without it each output is merged, scored
                and removed before the next one.
    print_line: receives a line per score.

    Raises UserError if the command fails (earlier scores are kept), or if `out` holds another sweep.
    """
    if not keep and command is None:
        raise UserError("--no-keep is for sweeps with scores: give the scoring command with --eval-cmd")
    fingerprints = [source.hashes() for source in opened.sources]
    keys = [plan.key(fingerprints) for plan in plans]
    check_outside_inputs(str(out), opened)
    report = score_reporter(print_line)
    with Workspace(str(out), "\n".join(keys)) as workspace:
        # 1. Resume from sweep.json. The folder of an output that the user removed becomes None.
        sweep = _resume(plans, keys, betas, workspace, command, metric, lower)
        points = [next(point for point in sweep.points if point.beta == beta) for beta in betas]
        for point in points:
            if point.folder is not None and not exists(join(workspace.url, f"{point.folder}/{RECORD}")):
                point.folder = None
        names = [point.folder or name for point, name in zip(points, folder_names(betas), strict=True)]

        # 2. Write all outputs in one pass.
        if keep:
            folders = [join(workspace.url, name) for name in names]
            records = execute(plans, opened, folders, chunk=chunk, threads=threads, progress=progress)
            sweep.records = dict(zip(betas, records, strict=True))
            for point, name in zip(points, names, strict=True):
                point.folder = name
        if keep or workspace.remote:  # a store that refuses writes fails here, before hours of scoring
            _save(sweep, workspace)

        # 3. Score each output. If there is no local copy, merge it once more into a temporary folder.
        for plan, point, name in zip(plans, points, names, strict=True):
            temporary = workspace.remote or point.folder is None
            trial = workspace.folder / (name if temporary else point.folder or name)
            if command is not None and point.metrics is None:
                if temporary:
                    records = execute(
                        [plan], opened, [trial], chunk=chunk, threads=threads, progress=progress
                    )
                    sweep.records[point.beta] = records[0]
                point.metrics = workspace.score(command, trial, trial.name)
                sweep.metric = choose_metric(point.metrics, metric or sweep.metric)
                _save(sweep, workspace)
                line = f"beta {point.beta:g}: {format_metrics(point.metrics)}"
                report(line, sweep.metric, sweep.lower)
            if temporary:
                discard(trial)
        if command is not None:
            _publish_reports(sweep, workspace)
        return sweep


def _resume(
    plans: Sequence[Plan],
    keys: Sequence[str],
    betas: Sequence[float],
    workspace: Workspace,
    command: Command | None,
    metric: str | None,
    lower: bool | None,
) -> Sweep:
    """The sweep in sweep.json, with a point for each of `betas`. Raises UserError if it is another sweep."""
    words = command.words if command is not None else ()
    a, b = plans[0].addresses[:2]
    sweep = Sweep(a, b, words, metric, bool(lower))
    earlier = _read(workspace)
    if not any(point.metrics for point in earlier.points):
        earlier.command = ()  # a command that never gave a score, such as one with a typo, may be replaced
    if earlier.command and words and earlier.command != words:
        raise UserError(
            f"{join(workspace.url, RESULTS)}: was scored by another command, {' '.join(earlier.command)}; "
            "choose another --out, or delete that file to score again"
        )
    if not words:
        sweep.command, sweep.metric, sweep.lower = earlier.command, earlier.metric, earlier.lower
    elif metric in (None, earlier.metric):
        sweep.metric, sweep.lower = earlier.metric, earlier.lower if lower is None else lower
    scored = [point.metrics for point in earlier.points if point.metrics]
    if metric is not None and scored and not any(metric in metrics for metrics in scored):
        choose_metric(scored[0], metric)  # raises UserError
    known = {point.beta: point for point in earlier.points}
    for key, beta in zip(keys, betas, strict=True):
        point = known.setdefault(beta, SweepPoint(beta, None, key))
        if point.plan != key:
            inputs = (
                "" if (earlier.a, earlier.b) == (a, b) else f", where A is {earlier.a} and B is {earlier.b}"
            )
            raise UserError(
                f"{workspace.url}: holds a sweep of other weights or options (beta {beta:g}){inputs}; "
                "choose another --out, or remove it"
            )
    sweep.points = [known[beta] for beta in sorted(known)]
    return sweep


def _read(workspace: Workspace) -> Sweep:
    """The sweep in sweep.json; an empty one if there is no file."""
    raw = workspace.read(RESULTS)
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
            [SweepPoint(e["beta"], e["folder"], e["plan"], e["figures"]) for e in content["betas"]],
        )
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f"{join(workspace.url, RESULTS)}: not written by dromos sweep; choose another --out, or delete that file"
        ) from None


def _save(sweep: Sweep, workspace: Workspace) -> None:
    workspace.publish(RESULTS, json.dumps(sweep.plain(), indent=1) + "\n")


def _publish_reports(sweep: Sweep, workspace: Workspace) -> None:
    from pretrain.merge.sweeps.chart import picture

    workspace.publish("sweep.csv", sweep.as_csv())
    workspace.publish("sweep.svg", picture(sweep))
