"""Zero-shot classification: images against the mean of a class's prompts (Radford et al. 2021, section 3.1)."""

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
from pretrain.evaluate.held_out import passes, tell_left_out, unusable
from pretrain.objectives.base import Forward
from pretrain.recipe.data import Stream
from pretrain.recipe.schema import ZeroShot


def classifier(
    forward: Forward, wanted: ZeroShot, tokenizer: Tokenizer, length: int, device: torch.device
) -> Tensor:
    """`[classes, embed]`: the normalised mean of the normalised text features of each class's prompts."""
    weights = []
    for name in wanted.classes.values():
        prompts = [caption_row(tokenizer, template.format(name), length)[0] for template in wanted.templates]
        features = forward(tokens=torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device))["text"]
        weights.append(F.normalize(features.mean(dim=0), dim=0))
    return torch.stack(weights)


def classify(
    forward: Forward,
    wanted: ZeroShot,
    stream: Stream,
    tokenizer: Tokenizer,
    batch: int,
    runtime: Runtime,
    cache: CacheSettings | None = None,
) -> dict[str, Any]:
    """`{"top1", "samples", "classes", "confusion"}`; confusion `[true][predicted]` in counts."""
    assert stream.text is not None
    spec = evaluation_spec("held_out", wanted, stream, batch)
    labels = {label: number for number, label in enumerate(wanted.classes)}
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.float64, device=runtime.device)
    left_out = torch.zeros(1, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), closing(EvaluationPass(spec, cache=cache)) as builder:
        weights = classifier(forward, wanted, tokenizer, stream.text.length, runtime.device)
        for rows, made in passes(builder, spec, stream.image, runtime):
            left_out += unusable(made)
            predicted = (forward(images=rows.images)["image"].float() @ weights.float().T).argmax(dim=1)
            for row, choice in enumerate(predicted.tolist()):
                if made.weights[row] == 0:
                    continue
                member = (made.meta[row]["json"] if made.meta else None) or {}
                label = str(member.get(wanted.label))
                if label not in labels:
                    key = made.meta[row]["key"] if made.meta else row
                    raise UserError(
                        f"eval.zero_shot: {wanted.path}: sample {key}: json member says {wanted.label}={label!r}, "
                        f"which is none of eval.zero_shot classes ({', '.join(labels)})"
                    )
                confusion[labels[label], choice] += 1
    counts = all_sum(confusion)
    samples = int(counts.sum().item())
    tell_left_out(wanted.path, samples, float(all_sum(left_out)), runtime)
    return {
        "top1": counts.diagonal().sum().item() / samples,
        "samples": samples,
        "classes": list(wanted.classes.values()),
        "confusion": [[int(n) for n in row] for row in counts.tolist()],
    }
