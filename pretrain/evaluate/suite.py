"""All held-out metrics of a stage: during training, and for trained weights at an address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.build.objective import load_trained
from pretrain.build.streams import cache_settings
from pretrain.build.tokenizer import optional_tokenizer
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.held_out import HeldOutError
from pretrain.evaluate.measure import Context, Measure
from pretrain.evaluate.perplexity import PerplexityMeasure
from pretrain.evaluate.zero_shot import ZeroShotMeasure
from pretrain.objectives.base import Forward, Objective
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import Evaluation

# Name in the results -> measure. A new measure is a file beside this one and one line here.
# Each has its own kind of task and result, which `evaluate` hands from one of its methods to the next.
EVALUATIONS: dict[str, Measure[Any, Any]] = {
    "zero_shot": ZeroShotMeasure(),
    "perplexity": PerplexityMeasure(),
    "perplexity_shuffled": PerplexityMeasure(shuffle=True),
}
SINGLE_PROCESS = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def measures_of(objective: Objective, on_request: bool = False) -> dict[str, Measure[Any, Any]]:
    """The measures whose needs the objective predicts; with `on_request`, also those that must be asked for."""
    return {
        name: measure
        for name, measure in EVALUATIONS.items()
        if set(measure.needs) <= set(objective.predict) and (on_request or not measure.on_request)
    }


def evaluate(
    objective: Objective,
    forward: Forward,
    stage: TrainStage,
    tokenizer: Tokenizer | None,
    runtime: Runtime,
    evaluation: Evaluation | None = None,
    shuffle: bool = False,
    failed: dict[str, str] | None = None,
) -> dict[str, Any]:
    """`{measure: {task: result}}`, for example `{"zero_shot": {name: {...}}, "perplexity": {name: nll}}`. Collective.

    `evaluation` is by default the stage's own. Tasks of measures whose needs the objective does not predict are
    skipped. `shuffle` adds the measures that run on request.

    A task whose data cannot be read adds its name (zero_shot/NAME, perplexity/NAME) and the reason to `failed`, on
    every rank, and the other tasks go on; without `failed` the error is raised.
    """
    evaluation = evaluation or stage.eval
    context = Context(
        objective.predict, forward, stage, tokenizer, runtime, evaluation.batch, cache_settings(stage)
    )
    metrics: dict[str, Any] = {}
    for name, measure in measures_of(objective, shuffle).items():
        for task_name, task in measure.tasks(evaluation, stage).items():
            with _recording(failed, f"{name}/{task_name}"):
                metrics.setdefault(name, {})[task_name] = measure.run(context, task)
    return {name: results for name, results in metrics.items() if results}


@contextmanager
def _recording(failed: dict[str, str] | None, name: str) -> Iterator[None]:
    """Note a HeldOutError of the block in `failed`; raise it, or the error behind it, if `failed` is None."""
    try:
        yield
    except HeldOutError as error:
        if failed is None:
            raise (error.__cause__ or error) from None
        failed[name] = str(error)


def check_held_out(objective: Objective, stage: TrainStage) -> None:
    """Open every held-out source of the stage, so that a wrong path fails before the training and not after it.

    Raises UserError that names the path.
    """
    cache = cache_settings(stage)
    for key, name, _ in stage.eval.tasks():
        if key not in EVALUATIONS:
            raise UserError(
                f"eval.{key}.{name}: there is no measure for it; EVALUATIONS has {', '.join(EVALUATIONS)}"
            )
    for measure in measures_of(objective).values():
        for task in measure.tasks(stage.eval, stage).values():
            try:
                spec = measure.spec(task, stage, stage.eval.batch)
                with closing(EvaluationPass(spec, cache=cache)) as evaluation_pass:
                    evaluation_pass.check()
            except UserError as error:
                raise UserError(f"eval: {task.path}: {error}") from None


def flat_scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """The scalars of `evaluate` by their names in metrics.jsonl: `zero_shot/digits/top1`, `perplexity/text/nll`."""
    return {
        f"{name}/{task}/{key}": value
        for name, results in metrics.items()
        for task, result in results.items()
        for key, value in EVALUATIONS[name].scalars(result).items()
    }


def evaluate_weights(address: str, shuffle: bool = False) -> dict[str, Any]:
    """Evaluate the weights at `address` as the `eval` section of their stage says; `shuffle` as in `evaluate`.

    Raises UserError if the address is not a stage of a run, or if the stage has not finished.
    """
    objective, stage = load_trained(address)
    return evaluate(
        objective, objective.model, stage, optional_tokenizer(stage), SINGLE_PROCESS, shuffle=shuffle
    )
