"""Reference for the parity tests: one process trains a stage with plain torch on whole global batches."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.batches.batch_builder import BatchBuilder
from pretrain.build.objective import build
from pretrain.build.streams import stage_specs
from pretrain.losses.normalisation import count_targets
from pretrain.objectives.device_batch import to_device
from pretrain.recipe.schema import TrainStage
from pretrain.train.schedule import learning_rate


def groups(model: torch.nn.Module, decay: float) -> list[dict]:
    """Parameter groups, independent of engine.decay_groups: tensors with two or more sides longer than 1 decay."""
    wide = [p for p in model.parameters() if p.requires_grad and sum(side > 1 for side in p.shape) >= 2]
    rest = [p for p in model.parameters() if p.requires_grad and sum(side > 1 for side in p.shape) < 2]
    return [{"params": wide, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def plain_losses(
    stage: TrainStage, name: str, seed: int, run_dir: Path, steps: int
) -> list[dict[str, float]]:
    """Losses and gradient norms of `steps` steps, with the keys of metrics.jsonl."""
    objective, _ = build(stage, name, seed, run_dir)
    model = objective.model
    model.train()
    settings = stage.optimizer
    optimizer = torch.optim.AdamW(
        groups(model, settings.weight_decay), lr=0.0, betas=settings.betas, eps=settings.eps
    )
    builders = {spec.name: BatchBuilder(spec) for spec in stage_specs(stage, seed, name, objective.streams)}
    rows = []
    for step in range(steps):
        optimizer.zero_grad()
        row: dict[str, float] = {"loss": 0.0}
        for stream in objective.streams:
            size = stage.data[stream].batch
            batch = builders[stream].make(step, 0, size)
            count = float(size) if stage.objective.kind == "flip" else count_targets(batch)
            device_batch = to_device(batch, stage.data[stream].image, torch.device("cpu"))
            loss = objective.loss(model, stream, device_batch, count)
            loss.total.backward()
            row["loss"] += float(loss.total.detach())
            row |= {key: float(value) for key, value in loss.parts.items()}
        trained = [p for p in model.parameters() if p.grad is not None]
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, settings.clip or 1e30))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps, stage.schedule.warmup.value, settings.lr or 0.0, stage.schedule
            )
        optimizer.step()
        rows.append(row)
    return rows
