"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.errors import UserError
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.tokenizers import Tokenizer, caption_row
from pretrain.build.streams import evaluation_spec
from pretrain.distributed.collectives import all_sum
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.held_out import count_unusable, rank_slices, report_left_out
from pretrain.objectives.base import Forward
from pretrain.recipe.data import Stream
from pretrain.recipe.schema import ZeroShot


def classifier(
    forward: Forward, task: ZeroShot, tokenizer: Tokenizer, length: int, device: torch.device
) -> Tensor:
    """Class weights, fp32 `[classes, embed]`: the normalised mean of the normalised features of a class's prompts."""
    weights = []
    for name in task.classes.values():
        prompts = [
            caption_row(tokenizer, template.replace("{}", name), length)[0] for template in task.templates
        ]
        features = forward(tokens=torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device))["text"]
        weights.append(F.normalize(features.float().mean(dim=0), dim=0))
    return torch.stack(weights)


def classify(
    forward: Forward,
    task: ZeroShot,
    stream: Stream,
    tokenizer: Tokenizer,
    batch: int,
    runtime: Runtime,
    cache: CacheSettings | None = None,
) -> dict[str, Any]:
    """Classify a held-out source: `{"top1", "samples", "classes", "confusion"}`. Collective.

    top1: fraction of correct samples; classes: names; confusion: `[true][predicted]` counts. `stream` has the image
    and text settings; `batch`: rows over all ranks. Raises UserError for a label that is not in `task.classes`.
    """
    assert stream.text is not None
    spec = evaluation_spec("held_out", task, stream, batch)
    labels = {label: number for number, label in enumerate(task.classes)}
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.float64, device=runtime.device)
    left_out = torch.zeros(1, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), closing(EvaluationPass(spec, cache=cache)) as evaluation_pass:
        weights = classifier(forward, task, tokenizer, stream.text.length, runtime.device)
        for rows, host_batch in rank_slices(evaluation_pass, spec, stream.image, runtime):
            left_out += count_unusable(host_batch)
            predicted = (forward(images=rows.images)["image"].float() @ weights.T).argmax(dim=1)
            for row, choice in enumerate(predicted.tolist()):
                if host_batch.weights[row] == 0:
                    continue
                member = (host_batch.meta[row]["json"] if host_batch.meta else None) or {}
                label = str(member.get(task.label))
                if label not in labels:
                    key = host_batch.meta[row]["key"] if host_batch.meta else row
                    raise UserError(
                        f"eval.zero_shot: {task.path}: sample {key}: the json member has {task.label}={label!r}, "
                        f"which is not in eval.zero_shot classes ({', '.join(labels)})"
                    )
                confusion[labels[label], choice] += 1
    counts = all_sum(confusion)
    samples = int(counts.sum().item())
    report_left_out(task.path, samples, float(all_sum(left_out)), runtime)
    return {
        "top1": counts.diagonal().sum().item() / samples,
        "samples": samples,
        "classes": list(task.classes.values()),
        "confusion": [[int(n) for n in row] for row in counts.tolist()],
    }
