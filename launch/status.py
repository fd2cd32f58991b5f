"""State of a run, read from its folder alone: state, step, loss, newest checkpoint and incidents of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.recipe.yaml_file import load_yaml
from pretrain.run.folder import complete_steps, json_mapping
from pretrain.run.incidents import read_incidents
from pretrain.run.lock import holder
from pretrain.run.metrics_log import parse


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run. steps: its length, None where the recipe alone does not determine it."""

    name: str
    state: str  # done, running, not finished or not started; a merge that runs counts as not finished
    step: int
    steps: int | None
    loss: float | None
    checkpoint: int | None

    def line(self) -> str:
        of = f"/{self.steps}" if self.steps else ""
        parts = [
            f"{self.name:<16} {self.state:<12} step {self.step}{of}"
            if self.step
            else f"{self.name:<16} {self.state}"
        ]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.checkpoint is not None and self.state != "done":
            parts.append(f"newest checkpoint {self.checkpoint}")
        return "  ".join(parts)


def run_status(run: str | Path) -> list[StageStatus]:
    """The stages of a run in the recipe's order. Raises UserError if `run` is not a run folder."""
    folder = Path(run)
    path = folder / "recipe.yaml"
    if not path.exists():
        nested = sorted(str(item.parent) for item in folder.glob("*/recipe.yaml"))
        hint = f"; the runs in it are {', '.join(nested)}" if nested else "; `dromos list FOLDER` lists runs"
        raise UserError(f"{folder}: not a run folder (no recipe.yaml){hint}")
    stages = load_yaml(path).values.get("stages")
    if not isinstance(stages, dict):
        raise UserError(f"{path}: not a resolved recipe (it has no stages)")
    return [_stage(folder / str(name), str(name), content) for name, content in stages.items()]


def status_lines(run: str | Path) -> Iterator[str]:
    """The lines of `dromos status`: one per stage, then one each for its skipped steps and failed evaluations.

    The last line says who writes into the run folder, if anybody does. Reads the whole metrics.jsonl of each stage,
    unlike `run_status`. Raises UserError if `run` is not a run folder.
    """
    for stage in run_status(run):
        yield stage.line()
        incidents = read_incidents(Path(run) / stage.name / "metrics.jsonl")
        if incidents.skipped:
            yield "  " + _told("step", "skipped, a loss or the gradient was not finite", incidents.skipped)
        if incidents.failed:
            yield "  " + _told("evaluation", "failed", incidents.failed)
    if (who := holder(Path(run))) is not None:
        yield f"being written by {who}"


def _told(what: str, happened: str, incidents: Sequence[object]) -> str:
    """`1 evaluation failed: ...`, `3 evaluations failed; the last: ...`."""
    number, last = len(incidents), incidents[-1]
    return f"1 {what} {happened}: {last}" if number == 1 else f"{number} {what}s {happened}; the last: {last}"


def _stage(folder: Path, name: str, content: Any) -> StageStatus:
    result = json_mapping(folder / "result.json")
    last = last_row(folder / "metrics.jsonl")
    saved = complete_steps(folder / "checkpoints")
    step = (result or last).get("step")
    if result:
        state = "done"
    elif holder(folder) is not None:
        state = "running"
    else:
        state = "not finished" if folder.is_dir() else "not started"
    train = content.get("train") if isinstance(content, dict) else None
    steps = train.get("steps") if isinstance(train, dict) else None
    loss = last.get("loss")
    return StageStatus(
        name,
        state,
        step if isinstance(step, int) else 0,
        steps if isinstance(steps, int) else None,
        loss if isinstance(loss, int | float) else None,
        max(saved, default=None),
    )


def last_row(path: Path, tail: int = 1 << 20) -> dict[str, Any]:
    """The last whole row of a metrics.jsonl; {} if there is none. Reads the last `tail` bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - tail))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    rows = (parse(line) for line in reversed(lines))  # the last line may still be being written
    return next((row for row in rows if row is not None), {})


def find_runs(folder: str | Path, depth: int = 3) -> list[Path]:
    """Run folders at most `depth` levels below `folder`, sorted."""
    root = Path(folder)
    if (root / "recipe.yaml").exists():
        return [root]
    if depth == 0 or not root.is_dir():
        return []
    children = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [run for child in children for run in find_runs(child, depth - 1)]


def summary(run: Path) -> str:
    """One line for `dromos list`."""
    stages = run_status(run)
    return f"{run}: " + ", ".join(f"{stage.name} {stage.state}" for stage in stages)
