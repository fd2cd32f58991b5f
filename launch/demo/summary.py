"""The metrics of summary.json, measured by one process on the final weights of the stages."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data_pipeline.batches.batch_builder import BatchBuilder
from pretrain.build.module_weights import load_into
from pretrain.build.objective import load_trained
from pretrain.build.streams import stage_specs
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.distributed.engine import decay_groups
from pretrain.evaluate.suite import SINGLE_PROCESS, evaluate
from pretrain.merge.sweeps.sweep import interpolated
from pretrain.objectives.device_batch import to_device
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MASK_RATIOS = ("0", "0.5", "0.75")
CAPTIONERS = ("real", "real_no_text", "synthetic", "mix")
# Stage -> its key in text_nll of summary.json.
TEXT_NLL_KEYS = {"lm": "before", "real": "with_text", "real_no_text": "without_text"}


def summarise(root: Path, console: Console) -> dict[str, Any]:
    """Return the content of summary.json without "seconds". `root` holds the runs flip and sphinx."""
    console.print("zero-shot and step times")
    flip = flip_metrics(root)
    sphinx = sphinx_metrics(root, console)
    console.print("sweep between real and synthetic")
    return {"flip": flip, "sphinx": sphinx, "merge": {"sweep": sweep_metrics(root)}}


def flip_metrics(root: Path) -> dict[str, Any]:
    objective, stage = load_trained(str(root / "flip" / "tuned"))
    metrics = evaluate(objective, objective.model, stage, stage_tokenizer(stage), SINGLE_PROCESS)
    digits = metrics["zero_shot"]["digits"]
    return {
        "zero_shot_top1": digits["top1"],
        "held_out": digits["samples"],
        "classes": digits["classes"],
        "confusion": digits["confusion"],
        "step_seconds": step_seconds(objective, stage),
    }


def step_seconds(objective: Any, stage: TrainStage, repeats: int = 3) -> dict[str, float]:
    """Return the median seconds per step (forward, backward, update) of the global batch, by mask ratio.

    Runs in one process. The first of `repeats` + 1 steps is a warmup and is not counted. The learning rate is 0.
    """
    (spec,) = stage_specs(stage, 0, "timing", objective.streams)
    batch = BatchBuilder(spec).make(0, 0, spec.rows(0))
    rows = to_device(batch, stage.data[main_stream(stage)].image, SINGLE_PROCESS.device)
    optimizer = torch.optim.AdamW(decay_groups(objective.model, 0.0), lr=0.0)
    objective.model.train()
    seconds = {}
    for mask in MASK_RATIOS:
        objective.mask = float(mask)
        durations = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            loss = objective.loss(objective.model, spec.name, rows, float(spec.rows(0)))
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            durations.append(time.perf_counter() - start)
        seconds[mask] = round(statistics.median(durations[1:]), 4)
    return seconds


def sphinx_metrics(root: Path, console: Console) -> dict[str, Any]:
    text: dict[str, float] = {}
    captions: dict[str, dict[str, float]] = {}
    shuffled: dict[str, dict[str, float]] = {}
    vocabulary = 0
    for name in ("lm", *CAPTIONERS):
        console.print(f"held-out metrics of {name}")
        objective, stage = load_trained(str(root / "sphinx" / name))
        tokenizer = stage_tokenizer(stage)
        vocabulary = tokenizer.vocab_size
        metrics = evaluate(objective, objective.model, stage, tokenizer, SINGLE_PROCESS, shuffle=True)
        if name in TEXT_NLL_KEYS:
            text[TEXT_NLL_KEYS[name]] = metrics["perplexity"]["text"]
        if "perplexity_shuffled" in metrics:
            shuffled[name] = metrics["perplexity_shuffled"]
            captions[name] = {domain: metrics["perplexity"][domain] for domain in shuffled[name]}
    return {
        "ln_vocabulary": float(np.log(vocabulary)),
        "text_nll": text,
        "caption_nll": captions,
        "caption_nll_shuffled": shuffled,
    }


def _to_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(tensors[name])) for name in tensors}


def sweep_metrics(root: Path) -> list[dict[str, float]]:
    """Return the NLL of both caption domains and of text for every beta, with interpolated weights.

    theta = beta * real + (1 - beta) * synthetic; no weights are written to disk.
    """
    a, b = (str(root / "sphinx" / name) for name in ("real", "synthetic"))
    objective, stage = load_trained(a)
    tokenizer = stage_tokenizer(stage)
    rows = []
    for beta in BETAS:
        load_into(objective.model, _to_torch(interpolated(a, b, beta)), f"beta {beta}")
        nll = evaluate(objective, objective.model, stage, tokenizer, SINGLE_PROCESS)["perplexity"]
        rows.append({"beta": beta} | {f"nll_{name}": nll[name] for name in ("real", "synthetic", "text")})
    return rows
