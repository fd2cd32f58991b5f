"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer, caption_row
from pretrain.build.streams import evaluation_spec
from pretrain.distributed.collectives import all_sum
from pretrain.evaluate.held_out import count_unusable, open_pass, rank_slices, report_left_out, together
from pretrain.evaluate.measure import Context
from pretrain.objectives.base import Embed
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import Evaluation, ZeroShot


@dataclass(frozen=True)
class ZeroShotMeasure:
    """Zero-shot classification with the image and text settings of the stage's main stream."""

    needs = ("embed",)
    on_request = False

    def tasks(self, evaluation: Evaluation, stage: TrainStage) -> Mapping[str, ZeroShot]:
        return evaluation.of(ZeroShot)

    def spec(self, task: ZeroShot, stage: TrainStage, batch: int) -> StreamSpec:
        return evaluation_spec("held_out", task, stage.data[main_stream(stage)], batch)

    def run(self, context: Context, task: ZeroShot) -> dict[str, Any]:
        return classify(context, task, self.spec(task, context.stage, context.batch))

    def scalars(self, result: dict[str, Any]) -> dict[str, float]:
        return {"top1": result["top1"]}


def classifier(
    embed: Callable[..., dict[str, Tensor]],
    task: ZeroShot,
    tokenizer: Tokenizer,
    length: int,
    device: torch.device,
) -> Tensor:
    """Class weights, fp32 `[classes, width]`: the normalised mean of the normalised features of a class's prompts."""
    weights = []
    for name in task.classes.values():
        prompts = [
            caption_row(tokenizer, template.replace("{}", name), length)[0] for template in task.templates
        ]
        features = embed(tokens=torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device))["text"]
        weights.append(F.normalize(features.float().mean(dim=0), dim=0))
    return torch.stack(weights)


def true_classes(task: ZeroShot, batch: Batch) -> list[int | None]:
    """The class of each row, from its json member; None for padding. Raises UserError for an unknown label."""
    labels = {label: number for number, label in enumerate(task.classes)}
    found: list[int | None] = []
    for row, weight in enumerate(batch.weights):
        if weight == 0:
            found.append(None)
            continue
        member = (batch.meta[row]["json"] if batch.meta else None) or {}
        label = str(member.get(task.label))
        if label not in labels:
            key = batch.meta[row]["key"] if batch.meta else row
            raise UserError(
                f"eval.zero_shot: {task.path}: sample {key}: the json member has {task.label}={label!r}, "
                f"which is not in eval.zero_shot classes ({', '.join(labels)})"
            )
        found.append(labels[label])
    return found


def classify(context: Context, task: ZeroShot, spec: StreamSpec) -> dict[str, Any]:
    """Classify a held-out source: `{"top1", "samples", "classes", "confusion"}`. Collective.

    top1: fraction of correct samples; classes: names; confusion: `[true][predicted]` counts. Raises HeldOutError, also
    for a label that is not in `task.classes`.
    """
    runtime, stream = context.runtime, context.stage.data[main_stream(context.stage)]
    assert stream.text is not None
    assert context.tokenizer is not None, "prompts need a tokenizer"
    embed = partial(cast(Embed, context.predict["embed"]), context.forward)
    classes = len(task.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.float64, device=runtime.device)
    left_out = torch.zeros(1, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), closing(open_pass(spec, context.cache)) as evaluation_pass:
        weights = classifier(embed, task, context.tokenizer, stream.text.length, runtime.device)
        for rows, host_batch in rank_slices(evaluation_pass, spec, stream.image, runtime):
            left_out += count_unusable(host_batch)
            predicted = (embed(images=rows.images)["image"].float() @ weights.T).argmax(dim=1)
            true = together(partial(true_classes, task, host_batch))
            for row, choice in zip(true, predicted.tolist(), strict=True):
                if row is not None:
                    confusion[row, choice] += 1
    counts = all_sum(confusion)
    samples = int(counts.sum().item())
    report_left_out(task.path, samples, float(all_sum(left_out)), runtime)
    return {
        "top1": counts.diagonal().sum().item() / samples,
        "samples": samples,
        "classes": list(task.classes.values()),
        "confusion": [[int(n) for n in row] for row in counts.tolist()],
    }
