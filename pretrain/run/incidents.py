"""Steps that were skipped and evaluations that failed, read from metrics.jsonl: for the report and `dromos status`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.run.metrics_log import parse

# Fields of a line that has an incident. Lines without them are not parsed: the logs of long runs are large.
MARKS = (b'"non_finite"', b'"eval_failed"')
HARDWARE = "not when computed again: suspect the hardware"


@dataclass(frozen=True)
class Origin:
    """Where the first value that is not finite appeared.

    stream: the stream whose rows were computed
    kind:   output, loss or gradient
    module: name of the module for an output, of the parameter's module for a gradient; None for a loss
    """

    stream: str
    kind: str
    module: str | None

    @property
    def place(self) -> str:
        """`the output of MODULE`, `the gradient of MODULE` or `the loss`."""
        return f"the {self.kind} of {self.module}" if self.module else "the loss"

    def __str__(self) -> str:
        return f"first in {self.place}, stream {self.stream}"


@dataclass(frozen=True)
class SkippedStep:
    """A step that updated nothing because a loss or the gradient was not finite.

    values: names of the losses, or grad_norm, that were not finite
    origin: where the first such value appeared; None if all were finite when the step was computed again
    """

    step: int
    values: tuple[str, ...]
    origin: Origin | None

    def __str__(self) -> str:
        return f"step {self.step}: {', '.join(self.values)} ({self.origin or HARDWARE})"


@dataclass(frozen=True)
class FailedEvaluation:
    """An evaluation, such as zero_shot/NAME, whose figures of a step are missing, and why."""

    step: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.reason}"


@dataclass
class Incidents:
    """All incidents of a stage, by step."""

    skipped: list[SkippedStep] = field(default_factory=list)
    failed: list[FailedEvaluation] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add those of a line of metrics.jsonl; fields of another type, as in a damaged file, count as unknown."""
        step, skipped, failed = row["step"], row.get("non_finite"), row.get("eval_failed")
        if isinstance(skipped, dict):
            values = skipped.get("values")
            names = tuple(map(str, values)) if isinstance(values, list) else ()
            self.skipped.append(SkippedStep(step, names, _origin(skipped.get("origin"))))
        if isinstance(failed, dict):
            self.failed += [FailedEvaluation(step, str(name), str(why)) for name, why in failed.items()]


def read_incidents(path: Path) -> Incidents:
    """The incidents in a metrics.jsonl; none if the file does not exist."""
    found = Incidents()
    try:
        with open(path, "rb") as file:
            for line in file:
                if any(mark in line for mark in MARKS) and (row := parse(line)) is not None:
                    found.add(row)
    except (FileNotFoundError, NotADirectoryError):
        pass
    return found


def _origin(value: Any) -> Origin | None:
    if not isinstance(value, dict):
        return None
    module = value.get("module")
    return Origin(
        str(value.get("stream", "?")),
        str(value.get("kind", "?")),
        None if module is None else str(module),
    )
