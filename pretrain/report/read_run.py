"""Reads a run folder once: recipe, environment, and the metrics and result of each stage."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.run import metrics_log
from pretrain.run.bad_sample_log import BadSamples, read_bad_samples
from pretrain.run.folder import LEFT_OUT, json_mapping
from pretrain.run.incidents import Incidents

# Types of the entries that the report reads; a damaged file may hold others.
ROW: dict[str, type] = {"time": dict, "eval": dict, "samples": dict, "skipped": dict}
ENVIRONMENT: dict[str, type] = {"gpus": list, "packages": dict, "source": dict, "environment": dict}


@dataclass(frozen=True)
class Stage:
    """One stage of a run. `rows` are the objects of its metrics.jsonl, `settings` is its part of the recipe."""

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    bad_samples: BadSamples = field(default_factory=lambda: BadSamples([], 0))
    started: bool = False
    left_out: dict[str, Any] = field(default_factory=dict)  # source -> reason -> files in no sample

    @property
    def is_merge(self) -> bool:
        return self.settings.get("kind") == "merge"

    @property
    def state(self) -> str:
        return "done" if self.result is not None else "not finished" if self.started else "not started"

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else int((self.result or {}).get("step") or 0)

    @property
    def total_steps(self) -> int | None:
        steps = (self.settings.get("train") or {}).get("steps")
        return steps if isinstance(steps, int) else None

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and finite values of a logged metric. `time/NAME` is NAME of the row's "time" object."""
        steps, values = [], []
        for row in self.rows:
            holder = row.get("time") or {} if key.startswith("time/") else row
            value = holder.get(key.removeprefix("time/"))
            if isinstance(value, int | float) and math.isfinite(value):
                steps.append(row["step"])
                values.append(float(value))
        return steps, values

    def sum_of(self, key: str) -> float:
        return sum(self.column(key)[1])

    def loss_parts(self) -> list[str]:
        """Return the keys of the loss parts; an empty list if there is only one part."""
        parts = sorted({key for row in self.rows[:1] for key in row if key.startswith("loss/")})
        return parts if len(parts) > 1 else []

    def evaluations(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return {metric: (steps, values)} of the evaluations during training."""
        metrics: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows:
            for key, value in flat(row.get("eval") or {}):
                steps, values = metrics.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
        return metrics

    def final_metrics(self) -> dict[str, tuple[int | None, float]]:
        """Return {metric: (step, value)} of the result, else of the last evaluation; None for a merge's step.

        If an evaluation failed at the end, its metrics are those of an earlier step.
        """
        found: dict[str, tuple[int | None, float]] = {
            key: (steps[-1], values[-1]) for key, (steps, values) in self.evaluations().items()
        }
        result = self.result or {}
        step = None if self.is_merge else result.get("step")
        return found | {key: (step, value) for key, value in flat(result.get("eval") or {})}

    def incidents(self) -> Incidents:
        """Return the steps that were skipped and the evaluations that failed."""
        found = Incidents()
        for row in self.rows:
            found.add(row)
        return found

    def samples(self) -> Counter[str]:
        """Return the number of samples served, by stream."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts.update(row.get("samples") or {})
        return counts

    def replaced(self) -> Counter[tuple[str, str]]:
        """Return the number of samples replaced, by (source, reason)."""
        counts: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            for source, reasons in (row.get("skipped") or {}).items():
                for reason, count in reasons.items():
                    counts[source, reason] += count
        return counts


@dataclass(frozen=True)
class Run:
    """The content of a run folder. `recipe` is the text of recipe.yaml, `job` the content of job.json."""

    folder: Path
    name: str
    recipe: str
    environment: dict[str, Any]
    job: dict[str, Any]
    stages: list[Stage]

    def stage(self, name: str) -> Stage | None:
        """Return the stage with this name; None if it has no metrics and no result."""
        found = next((stage for stage in self.stages if stage.name == name), None)
        return found if found is not None and (found.rows or found.result) else None


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if the folder has no recipe.yaml and no stage, or a file is malformed."""
    recipe = _text(folder / "recipe.yaml")
    settings = _recipe(folder / "recipe.yaml", recipe)
    described = _mapping(settings.get("stages"))
    recorded = [path.parent for path in sorted(folder.glob("*/resolved.yaml"))]
    recorded += [path.parent for path in sorted(folder.glob("*/metrics.jsonl"))]
    names = dict.fromkeys([*described, *(path.name for path in recorded)])
    if not recipe and not recorded:
        state = "is not a run folder" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {state} (no recipe.yaml, no stage); `dromos list FOLDER` lists the runs below a folder"
        )
    return Run(
        folder=folder,
        name=str(_mapping(settings.get("run")).get("name") or folder.resolve().name),
        recipe=recipe,
        environment=_typed(json_mapping(folder / "env.json"), ENVIRONMENT),
        job=json_mapping(folder / "job.json"),
        stages=[_stage(folder / str(name), described.get(name)) for name in names],
    )


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of nested objects with their path, such as `zero_shot/digits/top1`."""
    numbers: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            numbers += flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append((f"{prefix}{key}", float(value)))
    return numbers


def _stage(folder: Path, settings: Any) -> Stage:
    if settings is None:
        settings = _recipe(folder / "resolved.yaml", _text(folder / "resolved.yaml")).get("stage")
    return Stage(
        name=folder.name,
        settings=_typed(_mapping(settings), {"train": dict}),
        rows=[_row(row) for row in metrics_log.read(folder / "metrics.jsonl")],
        result=_typed(json_mapping(folder / "result.json"), {"eval": dict, "step": int}) or None,
        bad_samples=read_bad_samples(folder / "bad_samples.jsonl"),
        started=folder.is_dir(),
        left_out={source: _mapping(counts) for source, counts in json_mapping(folder / LEFT_OUT).items()},
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without counts that are no whole numbers, as in a damaged file."""
    row = _typed(row, ROW)
    skipped = {source: _counts(reasons) for source, reasons in (row.get("skipped") or {}).items()}
    return row | {"samples": _counts(row.get("samples")), "skipped": skipped}


def _counts(value: Any) -> dict[str, int]:
    return {name: count for name, count in _mapping(value).items() if type(count) is int}


def _mapping(value: Any) -> dict[str, Any]:
    """`value`, or an empty mapping in place of anything else that a damaged file holds."""
    return value if isinstance(value, dict) else {}


def _typed(values: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any]:
    """`values` without the entries of `kinds` that have another type, as in a damaged file."""
    return {
        key: value
        for key, value in values.items()
        if key not in kinds or value is None or isinstance(value, kinds[key])
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; restore it") from None


def _recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a YAML mapping, as a run writes it")
    return content
