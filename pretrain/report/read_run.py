"""What a run folder holds, read once: recipe, environment, and each stage's metrics and result."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.run import metrics_log
from pretrain.run.folder import json_mapping

EXAMPLES = 5


@dataclass(frozen=True)
class Stage:
    """One stage of a run; `rows` are the objects of its metrics.jsonl, `settings` its part of the recipe."""

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    bad: list[dict[str, Any]] = field(default_factory=list)
    started: bool = False

    @property
    def merge(self) -> bool:
        return self.settings.get("kind") == "merge"

    @property
    def state(self) -> str:
        return "done" if self.result is not None else "not finished" if self.started else "not started"

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else int((self.result or {}).get("step") or 0)

    @property
    def total(self) -> int | None:
        steps = (self.settings.get("train") or {}).get("steps")
        return steps if isinstance(steps, int) else None

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it was logged; `time/NAME` reaches into the time object."""
        steps, values = [], []
        for row in self.rows:
            holder = row.get("time") or {} if key.startswith("time/") else row
            value = holder.get(key.removeprefix("time/"))
            if isinstance(value, int | float):
                steps.append(row["step"])
                values.append(float(value))
        return steps, values

    def total_of(self, key: str) -> float:
        return sum(self.column(key)[1])

    def losses(self) -> list[str]:
        """The parts of the loss, where there is more than one."""
        parts = sorted({key for row in self.rows[:1] for key in row if key.startswith("loss/")})
        return parts if len(parts) > 1 else []

    def evaluations(self) -> dict[str, tuple[list[int], list[float]]]:
        """Figure -> steps and values, from the rows where an evaluation ran."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows:
            for key, value in flat(row.get("eval") or {}):
                steps, values = found.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
        return found

    def final(self) -> dict[str, float]:
        """Figures of the result, else of the last evaluation."""
        if self.result is not None and self.result.get("eval"):
            return dict(flat(self.result["eval"]))
        return {key: values[-1] for key, (_, values) in self.evaluations().items()}

    def samples(self) -> Counter[str]:
        """Rows served, by stream."""
        found: Counter[str] = Counter()
        for row in self.rows:
            found.update(row.get("samples") or {})
        return found

    def skipped(self) -> Counter[tuple[str, str]]:
        """Samples replaced, by source and reason."""
        found: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            for source, reasons in (row.get("skipped") or {}).items():
                for reason, count in reasons.items():
                    found[source, reason] += count
        return found


@dataclass(frozen=True)
class Run:
    """A run folder's content; `recipe` is its text."""

    folder: Path
    name: str
    recipe: str
    environment: dict[str, Any]
    job: dict[str, Any]
    stages: list[Stage]

    def stage(self, name: str) -> Stage | None:
        """The stage, if it has left any figures."""
        found = next((stage for stage in self.stages if stage.name == name), None)
        return found if found is not None and (found.rows or found.result) else None


def read_run(folder: Path) -> Run:
    """Raises UserError, naming the folder, where nothing in it was written by a run."""
    recipe = _text(folder / "recipe.yaml")
    settings = _recipe(folder / "recipe.yaml", recipe)
    described = settings.get("stages") or {}
    left = [path.parent for path in sorted(folder.glob("*/resolved.yaml"))]
    left += [path.parent for path in sorted(folder.glob("*/metrics.jsonl"))]
    names = dict.fromkeys([*described, *(path.name for path in left)])
    if not recipe and not left:
        what = "holds no run" if folder.is_dir() else "is not there"
        raise UserError(
            f"{folder}: {what} (no recipe.yaml and no stage); `dromos list FOLDER` finds the runs below a folder"
        )
    return Run(
        folder=folder,
        name=str((settings.get("run") or {}).get("name") or folder.resolve().name),
        recipe=recipe,
        environment=json_mapping(folder / "env.json"),
        job=json_mapping(folder / "job.json"),
        stages=[_stage(folder / name, described.get(name)) for name in names],
    )


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers of nested objects, by their path: `zero_shot/digits/top1`."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{key}", float(value)))
    return found


def _stage(folder: Path, settings: dict[str, Any] | None) -> Stage:
    if settings is None:
        settings = _recipe(folder / "resolved.yaml", _text(folder / "resolved.yaml")).get("stage") or {}
    rows = [row for row in metrics_log.read(folder / "metrics.jsonl") if isinstance(row, dict)]
    return Stage(
        name=folder.name,
        settings=settings,
        rows=[row for row in rows if isinstance(row.get("step"), int)],
        result=json_mapping(folder / "result.json") or None,
        bad=metrics_log.read(folder / "bad_samples.jsonl")[:EXAMPLES],
        started=folder.is_dir(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not what a run writes there: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not what a run writes there: a mapping is expected")
    return content
