"""The interface of a held-out measure: it asks the objective for what it needs by name, never for a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from data_pipeline.batches.spec import StreamSpec
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.distributed.engine import Runtime
from pretrain.objectives.base import Forward
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import Evaluation, TaskKind

Result = TypeVar("Result")


@dataclass(frozen=True)
class Context:
    """What a measure may use.

    predict: see `Objective.predict`
    forward: the model's forward; the engine in training
    tokenizer: that of the stage, if any part of it names one
    batch:   rows of a held-out batch over all ranks
    """

    predict: Mapping[str, Callable[..., object]]
    forward: Forward
    stage: TrainStage
    tokenizer: Tokenizer | None
    runtime: Runtime
    batch: int
    cache: CacheSettings | None = None


class Measure(Protocol[TaskKind, Result]):
    """One held-out measure of tasks of one kind. `EVALUATIONS` in suite.py names it."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names in `Objective.predict`; without them the measure's tasks are skipped."""

    @property
    def on_request(self) -> bool:
        """True for a measure that runs only when it is asked for (`dromos eval --shuffle`)."""

    def tasks(self, evaluation: Evaluation, stage: TrainStage) -> Mapping[str, TaskKind]:
        """The tasks in a recipe's `eval` section that apply to a stage, by name."""

    def spec(self, task: TaskKind, stage: TrainStage, batch: int) -> StreamSpec:
        """The held-out source of a task as a stream."""

    def run(self, context: Context, task: TaskKind) -> Result:
        """The result of one task over all ranks, as JSON; collective. Raises UserError."""

    def scalars(self, result: Result) -> dict[str, float]:
        """The figures of a result that go into metrics.jsonl, by name."""
