"""All held-out metrics of a stage: during training, and for trained weights at an address."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.build.objective import load_trained
from pretrain.build.streams import cache_settings, evaluation_spec
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.perplexity import token_nll
from pretrain.evaluate.zero_shot import classify
from pretrain.objectives.base import Forward
from pretrain.objectives.flip import Flip
from pretrain.recipe.data import Stream
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import Evaluation, TrainStage

SINGLE_PROCESS = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def evaluate(
    objective: Any,
    forward: Forward,
    stage: TrainStage,
    tokenizer: Tokenizer,
    runtime: Runtime,
    evaluation: Evaluation | None = None,
    shuffle: bool = False,
) -> dict[str, Any]:
    """`{"zero_shot": {name: {...}}, "perplexity": {name: nll}, "perplexity_shuffled": {name: nll}}`. Collective.

    `evaluation` is by default the stage's own. FLIP evaluates only the zero-shot tasks, other objectives only the
    perplexity tasks. A perplexity task that names a stream is skipped if the stage has no such stream, or if the model
    has no vision tower. `shuffle` adds the caption NLL with images shuffled between samples.
    """
    evaluation = evaluation or stage.eval
    cache = cache_settings(stage)
    metrics: dict[str, Any] = {}
    if isinstance(objective, Flip):
        stream = stage.data[main_stream(stage)]
        for name, task in evaluation.zero_shot.items():
            result = classify(forward, task, stream, tokenizer, evaluation.batch, runtime, cache)
            metrics.setdefault("zero_shot", {})[name] = result
        return metrics
    for name, nll_task in evaluation.perplexity.items():
        settings = stage.data.get(nll_task.stream) if nll_task.stream else None
        if nll_task.stream and (settings is None or objective.tower is None):
            continue
        nll = token_nll(objective, forward, nll_task, settings, evaluation.batch, runtime, cache=cache)
        metrics.setdefault("perplexity", {})[name] = nll
        if shuffle and settings is not None:
            shuffled = token_nll(
                objective, forward, nll_task, settings, evaluation.batch, runtime, True, cache
            )
            metrics.setdefault("perplexity_shuffled", {})[name] = shuffled
    return metrics


def check_held_out(objective: Any, stage: TrainStage) -> None:
    """Open every held-out source of the stage, so that a wrong path fails before the training and not after it.

    Raises UserError that names the path.
    """
    cache = cache_settings(stage)
    tasks: list[tuple[Any, Stream | None]] = []
    if isinstance(objective, Flip):
        stream = stage.data[main_stream(stage)]
        tasks = [(task, stream) for task in stage.eval.zero_shot.values()]
    else:
        for nll_task in stage.eval.perplexity.values():
            settings = stage.data.get(nll_task.stream) if nll_task.stream else None
            if not nll_task.stream or (settings is not None and objective.tower is not None):
                tasks.append((nll_task, settings))
    for task, settings in tasks:
        try:
            with closing(
                EvaluationPass(evaluation_spec("held_out", task, settings, stage.eval.batch), cache=cache)
            ) as evaluation_pass:
                evaluation_pass.check()
        except UserError as error:
            raise UserError(f"eval: {task.path}: {error}") from None


def flat_scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """The scalars of `evaluate` by their names in metrics.jsonl: `zero_shot/digits/top1`, `perplexity/text/nll`."""
    scalars = {f"zero_shot/{k}/top1": v["top1"] for k, v in metrics.get("zero_shot", {}).items()}
    for key in ("perplexity", "perplexity_shuffled"):
        scalars |= {f"{key}/{name}/nll": nll for name, nll in metrics.get(key, {}).items()}
    return scalars


def evaluate_weights(address: str, shuffle: bool = False) -> dict[str, Any]:
    """Evaluate the weights at `address` as the `eval` section of their stage says; `shuffle` as in `evaluate`.

    Raises UserError if the address is not a stage of a run, or if the stage has not finished.
    """
    objective, stage = load_trained(address)
    return evaluate(
        objective, objective.model, stage, stage_tokenizer(stage), SINGLE_PROCESS, shuffle=shuffle
    )
