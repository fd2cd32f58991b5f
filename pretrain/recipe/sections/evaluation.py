"""The `eval` section of a recipe: `TASKS` has one class per kind of held-out task.

A new kind is a class here and a line in TASKS; its measure is in `EVALUATIONS` of pretrain/evaluate/suite.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from pretrain.recipe.fields import Duration, Strict, variant_error
from pretrain.recipe.sections.data import parse_source


class Task(Strict):
    """One held-out source and what is measured on it."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What a model must be able to predict (`Objective.predict`)."""
    needs_words: ClassVar[str] = ""
    """The same for messages."""

    path: str
    """Folder or brace pattern of tars, as in data.STREAM.sources. Required."""


TaskKind = TypeVar("TaskKind", bound=Task)


class ZeroShot(Task):
    """Zero-shot classification of one labelled source."""

    needs = ("embed",)
    needs_words = "an image tower and a text tower"

    classes: dict[str, str] = Field(default_factory=dict)
    """Label in the json member -> class name in the prompt. Required."""
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    """Prompts; {} is replaced by the class name, and features are averaged. Default: ["a photo of a {}."]."""
    label: str = "label"
    """Field of the json member that holds the label. Default: label."""


class Perplexity(Task):
    """Mean negative log-likelihood (NLL) per token of one held-out source, in nats.

    The key is called perplexity, but the metric is the NLL itself, perplexity/NAME/nll; the perplexity is exp(NLL).
    """

    needs = ("nll",)
    needs_words = "a language model"

    stream: str | None = None
    """Stream whose image and text settings apply. Default: none, for packed text."""
    length: int | None = Field(None, gt=1)
    """Tokens per row of packed text; only without `stream`. Default: none."""


# Key of the `eval` section -> class of its tasks.
TASKS: dict[str, type[Task]] = {"zero_shot": ZeroShot, "perplexity": Perplexity}


class Evaluation(Strict):
    """Held-out evaluation, during the training and at its end.

    Every other key is a kind of task in TASKS, and holds a map: name -> task.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, SerializeAsAny[Task]]]

    every: Duration | None = None
    """Length between two evaluations. Default: only at the end of the stage."""
    batch: int = Field(256, gt=0)
    """Rows of an evaluation batch, over all ranks. Default: 256."""

    @model_validator(mode="before")
    @classmethod
    def _parse_tasks(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        parsed: dict[str, Any] = {}
        errors: list[InitErrorDetails] = []
        for key, item in value.items():
            if key in TASKS and isinstance(item, Mapping):
                parsed[key] = {
                    name: found
                    for name, task in item.items()
                    if (found := _parse_task(key, name, task, errors)) is not None
                }
            elif key in TASKS or key in cls.model_fields:
                parsed[key] = item  # what is wrong with it, pydantic says
            else:
                errors.append(InitErrorDetails(type="extra_forbidden", loc=(key,), input=item))
        if errors:
            raise ValidationError.from_exception_data("eval", errors)
        return parsed

    def of(self, kind: type[TaskKind]) -> dict[str, TaskKind]:
        """Name -> task of one kind, a class in TASKS."""
        tasks = [named for key, named in (self.__pydantic_extra__ or {}).items() if TASKS[key] is kind]
        return {name: task for named in tasks for name, task in named.items() if isinstance(task, kind)}

    def tasks(self) -> Iterator[tuple[str, str, Task]]:
        """(key of the section, name, task) of every task, of whatever kind."""
        for key, named in (self.__pydantic_extra__ or {}).items():
            yield from ((key, name, task) for name, task in named.items())


def _parse_task(key: str, name: str, task: Any, errors: list[InitErrorDetails]) -> Task | None:
    """One task of a kind; None if it is wrong, after its mistakes were added to `errors`."""
    if isinstance(task, Task):
        return task
    try:
        return TASKS[key].model_validate(parse_source(task))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            errors.append(
                InitErrorDetails(
                    # pydantic builds its own errors again from their name; others need an object.
                    type=item["type"] if item["type"] != "variant" else variant_error(item["ctx"]["message"]),
                    loc=(key, name, *item["loc"]),
                    input=item["input"],
                    ctx=item.get("ctx", {}),
                )
            )
        return None
