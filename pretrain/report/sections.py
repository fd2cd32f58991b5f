"""Report sections for any run: stages, losses, held-out metrics, throughput, samples, environment, recipe.

Each function takes one or more runs and returns one section.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from pretrain.report.formatting import duration, number, plural
from pretrain.report.incidents import (
    FAILED_TEXT,
    SKIPPED_TEXT,
    failed_evaluations,
    incident_notes,
    skipped_steps,
)
from pretrain.report.page import Block, Collapsible, Plot, Section, Table
from pretrain.report.plots import COLOURS, Line, line_plot, smooth, smoothing_window
from pretrain.report.read_run import Run, Stage

STEP = "step of the stage"
SKIPPED = "skipped step"
MAX_BAD_SAMPLES = 5  # listed per stage
FLOOR = "lower bound of the loss (repeated captions)"
Runs = Sequence[Run]


def labelled_stages(runs: Runs) -> list[tuple[str, Stage]]:
    """Return every stage with its label: STAGE, or RUN/STAGE if there are several runs."""
    return [
        (f"{run.name}/{stage.name}" if len(runs) > 1 else stage.name, stage)
        for run in runs
        for stage in run.stages
    ]


def logged_stages(runs: Runs) -> list[tuple[str, Stage]]:
    """Return the stages that have logged at least one step, with their labels."""
    return [(label, stage) for label, stage in labelled_stages(runs) if stage.rows]


def stages(runs: Runs) -> Section:
    labelled = labelled_stages(runs)
    done = sum(stage.state == "done" for _, stage in labelled)
    section = Section(
        "Stages", f"{done} of {plural(len(labelled), 'stage')} {'is' if done == 1 else 'are'} done"
    )
    section.text = [
        "A stage is one training run or one merge of weights. Data wait is the share of the step time that training "
        "spends waiting for samples; a value near zero means that the data loader is fast enough."
    ]
    head = ["stage", "state", "steps", "time", "samples/s", "data wait", "loss, first → last"]
    section.blocks.append(Table(head, [_stage_row(label, stage) for label, stage in labelled], left=2))
    metrics = [
        [label, key, number(value), "–" if step is None else number(step)]
        for label, stage in labelled
        for key, (step, value) in sorted(stage.final_metrics().items())
    ]
    if metrics:
        section.blocks.append(Table(["stage", "held-out metric", "last value", "at step"], metrics, left=2))
    absent = [label for label, stage in labelled if not stage.started]
    if absent:
        section.missing.append(f"Not started, so not shown below: {', '.join(absent)}.")
    section.missing += [
        f"Stage {label} has not finished; its metrics end at step {stage.step}."
        for label, stage in labelled
        if stage.state == "not finished"
    ]
    section.missing += incident_notes(labelled)
    return section


def _stage_row(label: str, stage: Stage) -> list[str]:
    steps = (
        "merge"
        if stage.is_merge
        else number(stage.step) + (f" / {number(stage.total_steps)}" if stage.total_steps else "")
    )
    seconds = stage.sum_of("time/step")
    if not stage.rows:
        merge_seconds = (stage.result or {}).get("seconds")
        took = duration(merge_seconds) if merge_seconds else "–"
        return [label, stage.state, steps, took, "–", "–", "–"]
    loss = stage.column("loss")[1]
    return [
        label,
        stage.state,
        steps,
        duration(seconds + stage.sum_of("time/eval")),
        number(sum(stage.samples().values()) / seconds) if seconds else "–",
        f"{stage.sum_of('time/data_wait') / seconds:.1%}" if seconds else "–",
        f"{number(loss[0])} → {number(loss[-1])}" if loss else "–",
    ]


def losses(runs: Runs) -> Section:
    """One plot per stage: the loss, its parts, and its lower bound if it was logged. Then the skipped steps."""
    found = [(label, stage) for label, stage in logged_stages(runs) if stage.column("loss")[1]]
    section = Section("Loss", "Loss: not logged yet")
    skipped = skipped_steps(logged_stages(runs))
    if not found:
        if skipped is not None:
            section.title = "Loss: no step had a finite loss"
            section.text, section.blocks = [SKIPPED_TEXT], [skipped]
        else:
            section.missing = ["No stage has logged a loss yet."]
        return section
    ends = [(label, stage.column("loss")[1]) for label, stage in found]
    section.title = "Loss: " + ", ".join(
        f"{label} {values[0]:.2f} → {values[-1]:.2f}" for label, values in ends[:4]
    )
    section.text = ["The loss of each optimizer step over the global batch, in nats. Lower is better."]
    if any(stage.column("loss_floor")[1] for _, stage in found):
        section.text = [*section.text, FLOOR_TEXT]
    section.blocks += [loss_plot(label, stage) for label, stage in found]
    if skipped is not None:
        section.text = [*section.text, SKIPPED_TEXT]
        section.blocks.append(skipped)
    return section


FLOOR_TEXT = (
    "The dashed line is the lowest possible loss with repeated captions: rows of a batch with the same caption have "
    "equal text features. It is the mean over the rows of ln(rows in the batch with the same caption)."
)


def loss_plot(label: str, stage: Stage) -> Plot:
    parts = stage.loss_parts() or ["loss"]
    curves = []
    window = 1
    for colour, key in enumerate(parts):
        steps, values = stage.column(key)
        window = smoothing_window(len(values))
        name = key.removeprefix("loss/") if key != "loss" else "loss"
        if window > 1:
            curves.append(Line("", steps, values, colour, unsmoothed=True))
        curves.append(Line(name, steps, list(smooth(values, window)), colour))
    steps, values = stage.column("loss_floor")
    if values:
        curves.append(Line(FLOOR, steps, values, COLOURS - 1, dashed=True))
    note = f"Thin line: every step. Thick line: mean over {window} steps." if window > 1 else ""
    if len(parts) > 1:
        note = f"The loss is the weighted sum of its parts. {note}"
    marks = [each.step for each in stage.incidents().skipped]
    return line_plot(f"Loss of {label}", curves, STEP, "loss (nats)", note=note, marks=marks, marked=SKIPPED)


def evaluations(runs: Runs) -> Section:
    """One plot per held-out metric, with a line per stage that measured it."""
    by_metric: dict[str, list[tuple[str, list[int], list[float]]]] = {}
    for label, stage in logged_stages(runs):
        for key, (steps, values) in stage.evaluations().items():
            by_metric.setdefault(key, []).append((label, steps, values))
    section = Section("Held-out metrics", "Held-out metrics: no evaluation has run")
    failed = failed_evaluations(logged_stages(runs))
    if not by_metric:
        if failed is not None:
            section.title = "Held-out metrics: every evaluation failed"
            section.text, section.blocks = [FAILED_TEXT], [failed]
        else:
            section.missing = [
                "No evaluation has run: the recipe has no eval section, or training has not reached an evaluation "
                "step."
            ]
        return section
    ends = [f"{key} {number(curves[-1][2][-1])} ({curves[-1][0]})" for key, curves in by_metric.items()]
    section.title = "On held-out data: " + ", ".join(ends[:2])
    section.text = [
        "Measured during training on data that no stage trains on; a finished stage is also measured at its last step."
    ]
    for key, curves in by_metric.items():
        drawn = [
            Line(label, steps, values, index % COLOURS, markers=True)
            for index, (label, steps, values) in enumerate(curves)
        ]
        section.blocks.append(line_plot(key, drawn, STEP, unit_of(key)))
    if failed is not None:
        section.text = [*section.text, FAILED_TEXT]
        section.blocks.append(failed)
    return section


def unit_of(key: str) -> str:
    """Return the unit of a held-out metric, from its name."""
    if key.endswith("nll"):
        return "nats per token"
    return "accuracy" if "top" in key else key.rpartition("/")[2]


def optimisation(runs: Runs) -> Section:
    found = logged_stages(runs)
    rates = [value for _, stage in found for value in stage.column("lr")[1]]
    norms = [value for _, stage in found for value in stage.column("grad_norm")[1] if math.isfinite(value)]
    section = Section("Optimizer", "Learning rate and gradient norm")
    if rates and norms:
        section.title = (
            f"Learning rate up to {max(rates):.1e}, gradient norm {min(norms):.2g} to {max(norms):.2g}"
        )
    section.text = [
        "The learning rate follows the warmup and decay of the schedule. The gradient norm is measured before "
        "clipping; a peak that does not fall again is an early sign of instability."
    ]
    section.blocks += metric_plots(found, "lr", "Learning rate", "learning rate")
    section.blocks += metric_plots(found, "grad_norm", "Gradient norm", "L2 norm", log=True, averaged=True)
    if not section.blocks:
        section.missing = ["No step was logged yet."]
    return section


def throughput(runs: Runs) -> Section:
    found = logged_stages(runs)
    section = Section("Throughput", "Throughput: not logged yet")
    seconds = sum(stage.sum_of("time/step") for _, stage in found)
    if not seconds:
        section.missing = ["No step was logged yet."]
        return section
    served = sum(sum(stage.samples().values()) for _, stage in found)
    waited = sum(stage.sum_of("time/data_wait") for _, stage in found)
    section.title = (
        f"{number(served / seconds)} samples per second; {waited / seconds:.1%} of the step time is data wait"
    )
    section.text = ["Samples of all streams and all ranks. Evaluations and checkpoints are not included."]
    rate = "time/samples_per_second"
    section.blocks += metric_plots(found, rate, "Throughput", "samples/s", averaged=True)
    section.blocks += metric_plots(found, "time/step", "Time per step", "seconds", averaged=True)
    return section


def metric_plots(
    found: Sequence[tuple[str, Stage]],
    key: str,
    title: str,
    unit: str,
    log: bool = False,
    averaged: bool = False,
) -> list[Block]:
    """Return one plot of a metric with a line per stage; an empty list if no stage logged it."""
    curves: list[Line] = []
    window = 1
    for label, stage in found:
        steps, values = stage.column(key)
        if log:
            values = [value if value > 0 else math.nan for value in values]
        if averaged and values:
            window = max(window, smoothing_window(len(values)))
            values = list(smooth(values, smoothing_window(len(values))))
        if values:
            curves.append(Line(label, steps, values, len(curves)))
    note = f"Mean over up to {window} steps." if window > 1 else ""
    return [line_plot(title, curves, STEP, unit, log=log, note=note)] if curves else []


def samples(runs: Runs) -> Section:
    """Samples served by stream, and replaced samples by source and reason."""
    found = logged_stages(runs)
    served = [(label, stream, n) for label, stage in found for stream, n in sorted(stage.samples().items())]
    total = sum(count for _, _, count in served)
    replaced: Counter[tuple[str, str, str]] = Counter()
    for label, stage in found:
        for (source, reason), count in stage.replaced().items():
            replaced[label, source, reason] += count
    bad = sum(replaced.values())
    part = f" ({bad / total:.3%})" if total else ""
    share = f"{number(bad)}{part} were replaced" if bad else "none were replaced"
    section = Section("Samples", f"{number(total)} samples were served, {share}")
    section.text = [
        "An unusable sample (damaged image, no caption) is replaced by another sample of its source, counted by "
        "reason, and listed in bad_samples.jsonl of its stage. That file has a line per try: a replacement that is "
        "unusable, too, has attempt 1 or more."
    ]
    if served:
        rows = [[label, stream, number(count)] for label, stream, count in served]
        section.blocks.append(Table(["stage", "stream", "samples"], rows, left=2, title="Samples by stream"))
    if replaced:
        lost = [[*where, number(count)] for where, count in sorted(replaced.items())]
        head = ["stage", "source", "reason", "replaced"]
        section.blocks.append(Table(head, lost, left=3, title="Replaced samples by source and reason"))
        examples = [
            [label, entry["reason"], entry["key"], entry["url"]]
            for label, stage in found
            for entry in stage.bad_samples.lines[:MAX_BAD_SAMPLES]
        ]
        if examples:
            head = ["stage", "reason", "sample", "shard"]
            section.blocks.append(Table(head, examples, left=4, title="The first replaced samples"))
    else:
        section.text = [*section.text, "No sample was replaced, so there is no table of reasons."]
    left_out = [
        [label, source, reason, number(count)]
        for label, stage in found
        for source, counts in stage.left_out.items()
        for reason, count in counts.items()
        if isinstance(count, int)
    ]
    if left_out:
        head = ["stage", "source", "kind", "files"]
        section.blocks.append(Table(head, left_out, left=3, title="Files in the tars that are in no sample"))
    section.missing += [
        f"Stage {label}: {stage.bad_samples.note}" for label, stage in found if stage.bad_samples.damaged
    ]
    return section


def environment(runs: Runs) -> Section:
    known = [run for run in runs if run.environment]
    section = Section("Environment", "Environment: env.json is missing")
    if not known:
        section.missing = ["The run folder has no env.json, so the environment is unknown."]
        return section
    first = known[0].environment
    section.title = (
        f"Ran on {plural(first.get('cores', '?'), 'core')}, {plural(len(first.get('gpus') or []), 'GPU')}, "
        f"Python {first.get('python', '?')}"
    )
    section.text = ["The environment of the last launch of the run, from env.json and job.json."]
    columns = [_facts(run) for run in known]
    keys = dict.fromkeys(key for column in columns for key in column)
    head = ["", *(run.name for run in known)]
    rows = [[key, *(column.get(key, "–") for column in columns)] for key in keys]
    section.blocks.append(Table(head, rows, left=len(head)))
    return section


def _facts(run: Run) -> dict[str, str]:
    recorded = run.environment
    facts: dict[str, str] = {
        key: _plain(recorded[key])
        for key in ("time", "host", "system", "python", "cores", "gpus")
        if key in recorded
    }
    for key in ("on", "nodes", "ranks_per_node"):
        if run.job.get(key) is not None:
            facts[key.replace("_", " ")] = _plain(run.job[key])
    source = recorded.get("source") or {}
    if source.get("commit"):
        facts["source"] = str(source["commit"])[:12] + (", with changes" if source.get("changed") else "")
    return facts | {str(name): _plain(version) for name, version in (recorded.get("packages") or {}).items()}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def recipes(runs: Runs) -> Section:
    section = Section(
        "Recipe",
        "The resolved recipe",
        [
            "The recipe with defaults and overrides filled in. It is itself a recipe, and runs the same training."
        ],
    )
    for run in runs:
        if run.recipe:
            section.blocks.append(Collapsible(f"{run.folder}/recipe.yaml", run.recipe))
        else:
            section.missing.append(
                f"{run.folder} has no recipe.yaml; the settings below are those that its stages recorded."
            )
            recorded = {stage.name: stage.settings for stage in run.stages}
            section.blocks.append(Collapsible(f"{run.folder}", yaml.safe_dump(recorded, sort_keys=False)))
    return section
