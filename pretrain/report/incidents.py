"""Steps that were skipped and evaluations that failed, as notes and tables of the report."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.report.formatting import number, plural
from pretrain.report.page import Table
from pretrain.report.read_run import Stage
from pretrain.run.incidents import HARDWARE

MAX_INCIDENTS = 20  # rows per stage in a table
SKIPPED_TEXT = (
    "A step whose loss or gradient is not finite is skipped: the weights stay as they are, the learning rate and the "
    "data advance."
)
FAILED_TEXT = (
    "An evaluation whose data cannot be read fails: its figures of that step are missing, and the training goes on. "
    "If the run resumes at that step, the evaluation is tried again."
)
Stages = Sequence[tuple[str, Stage]]  # with their labels


def incident_notes(stages: Stages) -> list[str]:
    """One line for each stage that skipped steps or whose evaluations failed: how many, and the last of them."""
    lines = []
    for label, stage in stages:
        incidents = stage.incidents()
        notes = []
        if skipped := incidents.skipped:
            steps = [f"step {number(each.step)}" for each in skipped]
            notes.append(
                f"{plural(len(skipped), 'step')} skipped because a loss or the gradient was not finite{_latest(steps)}"
            )
        if failed := incidents.failed:
            names = [f"{each.name} at step {number(each.step)}" for each in failed]
            notes.append(f"{plural(len(failed), 'evaluation')} failed{_latest(names)}")
        if notes:
            lines.append(f"Stage {label}: {'; '.join(notes)}.")
    return lines


def skipped_steps(stages: Stages) -> Table | None:
    """Table of the steps that were skipped, at most MAX_INCIDENTS per stage; None if there is none."""
    return incident_table(
        "Skipped steps",
        ["stage", "step", "not finite", "stream", "first seen in"],
        {
            label: [
                [
                    str(each.step),
                    ", ".join(each.values),
                    each.origin.stream if each.origin else "–",
                    each.origin.place if each.origin else HARDWARE,
                ]
                for each in stage.incidents().skipped
            ]
            for label, stage in stages
        },
    )


def failed_evaluations(stages: Stages) -> Table | None:
    """Table of the evaluations that failed, at most MAX_INCIDENTS per stage; None if there is none."""
    return incident_table(
        "Failed evaluations",
        ["stage", "step", "evaluation", "reason"],
        {
            label: [[str(each.step), each.name, each.reason] for each in stage.incidents().failed]
            for label, stage in stages
        },
    )


def incident_table(title: str, head: Sequence[str], by_stage: dict[str, list[list[str]]]) -> Table | None:
    """Table of the last MAX_INCIDENTS rows of each stage, with the stage in the first column; None without rows."""
    total = sum(map(len, by_stage.values()))
    rows = [[label, *cells] for label, found in by_stage.items() for cells in found[-MAX_INCIDENTS:]]
    if len(rows) < total:
        title += f": the last {MAX_INCIDENTS} of each stage, {number(total)} in all"
    return Table(head, rows, left=len(head), title=title, wraps=True) if rows else None


def _latest(names: Sequence[str]) -> str:
    return f" ({names[0]})" if len(names) == 1 else f" (the last: {names[-1]})"
