"""What can be said of any run: stages, losses, held-out figures, rates, samples, environment, recipe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from pretrain.report.page import Block, Folded, Plot, Section, Table
from pretrain.report.plots import COLOURS, Line, lines, smooth, window_for
from pretrain.report.read_run import Run, Stage

STEP = "step of the stage"
FLOOR = "floor of repeated captions"
Runs = Sequence[Run]


def named(runs: Runs) -> list[tuple[str, Stage]]:
    """Every stage with its label: with several runs, RUN/STAGE."""
    return [
        (f"{run.name}/{stage.name}" if len(runs) > 1 else stage.name, stage)
        for run in runs
        for stage in run.stages
    ]


def trained(runs: Runs) -> list[tuple[str, Stage]]:
    return [(label, stage) for label, stage in named(runs) if stage.rows]


def stages(runs: Runs) -> Section:
    every = named(runs)
    done = sum(stage.state == "done" for _, stage in every)
    section = Section(
        "Stages", f"{done} of {plural(len(every), 'stage')} {'is' if done == 1 else 'are'} done"
    )
    section.text = [
        "A stage is one training (or one merge of weights). Data wait is the share of the step time in which the "
        "training stood still for its samples; near zero means that loading keeps up."
    ]
    head = ["stage", "state", "steps", "time", "samples/s", "data wait", "loss, first → last"]
    section.blocks.append(Table(head, [_stage_row(label, stage) for label, stage in every], left=2))
    figures = [(label, key, value) for label, stage in every for key, value in sorted(stage.final().items())]
    if figures:
        rows = [[label, key, number(value)] for label, key, value in figures]
        section.blocks.append(Table(["stage", "held-out figure", "last value"], rows, left=2))
    absent = [label for label, stage in every if not stage.started]
    if absent:
        section.missing.append(f"Not run yet, so missing below: {', '.join(absent)}.")
    section.missing += [
        f"Stage {label} has not finished: its figures are those up to step {stage.step}."
        for label, stage in every
        if stage.state == "not finished"
    ]
    return section


def _stage_row(label: str, stage: Stage) -> list[str]:
    steps = (
        "merge" if stage.merge else number(stage.step) + (f" / {number(stage.total)}" if stage.total else "")
    )
    seconds = stage.total_of("time/step")
    if not stage.rows:
        took = (stage.result or {}).get("seconds")
        return [label, stage.state, steps, duration(took) if took else "–", "–", "–", "–"]
    loss = stage.column("loss")[1]
    return [
        label,
        stage.state,
        steps,
        duration(seconds + stage.total_of("time/eval")),
        number(sum(stage.samples().values()) / seconds) if seconds else "–",
        f"{stage.total_of('time/data_wait') / seconds:.1%}" if seconds else "–",
        f"{number(loss[0])} → {number(loss[-1])}" if loss else "–",
    ]


def losses(runs: Runs) -> Section:
    """A plot a stage: the whole loss, its parts, and the floor where one was logged."""
    found = [(label, stage) for label, stage in trained(runs) if stage.column("loss")[1]]
    section = Section("Loss", "Loss: nothing was logged yet")
    if not found:
        section.missing = ["No stage has logged a loss yet."]
        return section
    ends = [(label, stage.column("loss")[1]) for label, stage in found]
    section.title = "Loss: " + ", ".join(
        f"{label} {values[0]:.2f} → {values[-1]:.2f}" for label, values in ends[:4]
    )
    section.text = ["The loss of every optimizer step over the whole batch, in nats. Lower is better."]
    if any(stage.column("loss_floor")[1] for _, stage in found):
        section.text = [*section.text, FLOOR_TEXT]
    section.blocks += [loss_plot(label, stage) for label, stage in found]
    return section


FLOOR_TEXT = (
    "The dashed line is the floor that repeated captions impose: rows of a batch that carry the same caption cannot be "
    "told apart by it, which costs the mean over the rows of ln(rows in the batch with the same caption)."
)


def loss_plot(label: str, stage: Stage) -> Plot:
    parts = stage.losses() or ["loss"]
    curves = []
    window = 1
    for number_, key in enumerate(parts):
        steps, values = stage.column(key)
        window = window_for(len(values))
        name = key.removeprefix("loss/") if key != "loss" else "loss"
        if window > 1:
            curves.append(Line("", steps, values, number_, raw=True))
        curves.append(Line(name, steps, list(smooth(values, window)), number_))
    steps, values = stage.column("loss_floor")
    if values:
        curves.append(Line(FLOOR, steps, values, COLOURS - 1, dashed=True))
    note = f"Thin: every step. Thick: mean over {window} steps." if window > 1 else ""
    if len(parts) > 1:
        note = f"The loss is the weighted sum of its parts. {note}"
    return lines(f"Loss of {label}", curves, STEP, "loss (nats)", note=note)


def evaluations(runs: Runs) -> Section:
    """A plot a figure: every stage that measured it on held-out data."""
    by_figure: dict[str, list[tuple[str, list[int], list[float]]]] = {}
    for label, stage in trained(runs):
        for key, (steps, values) in stage.evaluations().items():
            by_figure.setdefault(key, []).append((label, steps, values))
    section = Section("Held-out figures", "Held-out figures: no evaluation has run")
    if not by_figure:
        section.missing = [
            "No evaluation has run: the recipe has no eval section, or no step of it was reached."
        ]
        return section
    ends = [f"{key} {number(curves[-1][2][-1])} ({curves[-1][0]})" for key, curves in by_figure.items()]
    section.title = "On held-out data: " + ", ".join(ends[:2])
    section.text = [
        "Measured during the training on data that no stage trains on; the last point of a line is its end."
    ]
    for key, curves in by_figure.items():
        drawn = [
            Line(label, steps, values, place % COLOURS, marks=True)
            for place, (label, steps, values) in enumerate(curves)
        ]
        section.blocks.append(lines(key, drawn, STEP, unit_of(key)))
    return section


def unit_of(key: str) -> str:
    """What an evaluation's name says of its unit."""
    if key.endswith("nll"):
        return "nats a token"
    return "share right" if "top" in key else key.rpartition("/")[2]


def optimisation(runs: Runs) -> Section:
    found = trained(runs)
    rates = [value for _, stage in found for value in stage.column("lr")[1]]
    norms = [value for _, stage in found for value in stage.column("grad_norm")[1] if math.isfinite(value)]
    section = Section("Optimizer", "Learning rate and gradient norm")
    if rates and norms:
        section.title = (
            f"Learning rate up to {max(rates):.1e}, gradient norm {min(norms):.2g} to {max(norms):.2g}"
        )
    section.text = [
        "The learning rate warms up and decays as the schedule says. The gradient norm is taken before clipping; "
        "peaks that do not come back down are the first sign of trouble."
    ]
    section.blocks += over_stages(found, "lr", "Learning rate", "learning rate")
    section.blocks += over_stages(found, "grad_norm", "Gradient norm", "L2 norm", log=True, averaged=True)
    if not section.blocks:
        section.missing = ["No step was logged yet."]
    return section


def throughput(runs: Runs) -> Section:
    found = trained(runs)
    section = Section("Throughput", "Throughput: no step was logged yet")
    seconds = sum(stage.total_of("time/step") for _, stage in found)
    if not seconds:
        section.missing = ["No step was logged yet."]
        return section
    served = sum(sum(stage.samples().values()) for _, stage in found)
    waited = sum(stage.total_of("time/data_wait") for _, stage in found)
    section.title = (
        f"{number(served / seconds)} samples a second; {waited / seconds:.1%} of the time waits for data"
    )
    section.text = [
        "Samples of all streams together, over all ranks; evaluations and checkpoints are not in it."
    ]
    rate = "time/samples_per_second"
    section.blocks += over_stages(found, rate, "Throughput", "samples/s", averaged=True)
    section.blocks += over_stages(found, "time/step", "Time of a step", "seconds", averaged=True)
    return section


def over_stages(
    found: Sequence[tuple[str, Stage]],
    key: str,
    title: str,
    unit: str,
    log: bool = False,
    averaged: bool = False,
) -> list[Block]:
    """One plot of a metric with a line a stage; none where nobody logged it."""
    curves: list[Line] = []
    window = 1
    for label, stage in found:
        steps, values = stage.column(key)
        if log:
            values = [value if value > 0 else math.nan for value in values]
        if averaged and values:
            window = max(window, window_for(len(values)))
            values = list(smooth(values, window_for(len(values))))
        if values:
            curves.append(Line(label, steps, values, len(curves)))
    note = f"Means over up to {window} steps." if window > 1 else ""
    return [lines(title, curves, STEP, unit, log=log, note=note)] if curves else []


def samples(runs: Runs) -> Section:
    """Rows served by stream, and replaced samples by source and reason."""
    found = trained(runs)
    served = [(label, stream, n) for label, stage in found for stream, n in sorted(stage.samples().items())]
    total = sum(count for _, _, count in served)
    replaced: Counter[tuple[str, str, str]] = Counter()
    for label, stage in found:
        for (source, reason), count in stage.skipped().items():
            replaced[label, source, reason] += count
    bad = sum(replaced.values())
    share = f"{number(bad)} ({bad / total:.3%}) were replaced" if bad else "none had to be replaced"
    section = Section("Samples", f"{number(total)} samples were served, {share}")
    section.text = [
        "A sample that cannot be used (broken bytes, no caption) is replaced by another of its source, counted by "
        "reason, and named in bad_samples.jsonl of its stage."
    ]
    if served:
        rows = [[label, stream, number(count)] for label, stream, count in served]
        section.blocks.append(Table(["stage", "stream", "samples"], rows, left=2, title="Samples by stream"))
    if replaced:
        lost = [[*where, number(count)] for where, count in sorted(replaced.items())]
        head = ["stage", "source", "reason", "replaced"]
        section.blocks.append(Table(head, lost, left=3, title="Skipped samples by source and reason"))
        examples = [
            [label, *(str(entry.get(key, "")) for key in ("reason", "key", "url"))]
            for label, stage in found
            for entry in stage.bad
        ]
        head = ["stage", "reason", "sample", "shard"]
        section.blocks.append(Table(head, examples, left=4, title="The first of them"))
    else:
        section.text = [*section.text, "No sample was skipped, so there is no table of reasons."]
    return section


def environment(runs: Runs) -> Section:
    known = [run for run in runs if run.environment]
    section = Section("Environment", "Environment: env.json is missing")
    if not known:
        section.missing = ["No env.json in the run folder: what it ran on was not recorded."]
        return section
    first = known[0].environment
    section.title = (
        f"Run on {plural(first.get('cores', '?'), 'core')}, {plural(len(first.get('gpus') or []), 'GPU')}, "
        f"Python {first.get('python', '?')}"
    )
    section.text = ["What the last launch of the run found; env.json and job.json hold it."]
    columns = [_facts(run) for run in known]
    keys = dict.fromkeys(key for column in columns for key in column)
    head = ["", *(run.name for run in known)]
    rows = [[key, *(column.get(key, "–") for column in columns)] for key in keys]
    section.blocks.append(Table(head, rows, left=len(head)))
    return section


def _facts(run: Run) -> dict[str, str]:
    told = run.environment
    facts: dict[str, str] = {
        key: _plain(told[key]) for key in ("time", "host", "system", "python", "cores", "gpus") if key in told
    }
    for key in ("on", "nodes", "ranks_per_node"):
        if run.job.get(key) is not None:
            facts[key.replace("_", " ")] = _plain(run.job[key])
    source = told.get("source") or {}
    if source.get("commit"):
        facts["source"] = str(source["commit"])[:12] + (", with changes" if source.get("changed") else "")
    return facts | {str(name): _plain(version) for name, version in (told.get("packages") or {}).items()}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def recipes(runs: Runs) -> Section:
    section = Section(
        "Recipe",
        "The resolved recipe",
        ["Defaults and overrides laid in: itself a recipe that runs the same."],
    )
    for run in runs:
        if run.recipe:
            section.blocks.append(Folded(f"{run.folder}/recipe.yaml", run.recipe))
        else:
            section.missing.append(f"{run.folder} holds no recipe.yaml; this is what its stages recorded.")
            recorded = {stage.name: stage.settings for stage in run.stages}
            section.blocks.append(Folded(f"{run.folder}", yaml.safe_dump(recorded, sort_keys=False)))
    return section


def number(value: float) -> str:
    """Readable: thousands separated, else four digits that count."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plural(count: Any, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """96 -> 1 min 36 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
