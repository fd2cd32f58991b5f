"""The demo's figures, all measured by one process on the weights that the stages left."""

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
from pretrain.build.objective import load_trained, stage_tokenizer
from pretrain.build.streams import stage_specs
from pretrain.distributed.engine import decay_groups
from pretrain.evaluate.suite import ALONE, evaluate
from pretrain.merge.sweeps.sweep import interpolated
from pretrain.objectives.device_batch import to_device
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MASKS = ("0", "0.5", "0.75")
CAPTIONERS = ("real", "real_no_text", "synthetic", "mix")


def summarise(root: Path, console: Console) -> dict[str, Any]:
    """`summary.json` without `seconds`."""
    console.print("zero-shot and step times")
    flip = flip_figures(root)
    sphinx = sphinx_figures(root, console)
    console.print("sweep between real and synthetic")
    return {"flip": flip, "sphinx": sphinx, "merge": {"sweep": sweep_figures(root)}}


def flip_figures(root: Path) -> dict[str, Any]:
    objective, stage = load_trained(str(root / "flip" / "tuned"))
    found = evaluate(objective, objective.model, stage, stage_tokenizer(stage), ALONE)["zero_shot"]["digits"]
    return {
        "zero_shot_top1": found["top1"],
        "held_out": found["samples"],
        "classes": found["classes"],
        "confusion": found["confusion"],
        "step_seconds": step_seconds(objective, stage),
    }


def step_seconds(objective: Any, stage: TrainStage, repeats: int = 3) -> dict[str, float]:
    """Median seconds of forward, backward and update of the whole batch in one process, by mask ratio."""
    (spec,) = stage_specs(stage, 0, "timing", objective.streams)
    batch = BatchBuilder(spec).make(0, 0, spec.rows(0))
    rows = to_device(batch, stage.data[main_stream(stage)].image, ALONE.device)
    optimizer = torch.optim.AdamW(decay_groups(objective.model, 0.0), lr=0.0)
    objective.model.train()
    seconds = {}
    for mask in MASKS:
        objective.mask = float(mask)
        took = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            loss = objective.loss(objective.model, spec.name, rows, float(spec.rows(0)))
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            took.append(time.perf_counter() - began)
        seconds[mask] = round(statistics.median(took[1:]), 4)
    return seconds


def sphinx_figures(root: Path, console: Console) -> dict[str, Any]:
    text: dict[str, float] = {}
    captions: dict[str, dict[str, float]] = {}
    shuffled: dict[str, dict[str, float]] = {}
    vocabulary = 0
    for name in ("lm", *CAPTIONERS):
        console.print(f"held-out figures of {name}")
        objective, stage = load_trained(str(root / "sphinx" / name))
        tokenizer = stage_tokenizer(stage)
        vocabulary = tokenizer.vocab_size
        found = evaluate(objective, objective.model, stage, tokenizer, ALONE, shuffle=True)
        if name in TEXT_AS:
            text[TEXT_AS[name]] = found["perplexity"]["text"]
        if "perplexity_shuffled" in found:
            shuffled[name] = found["perplexity_shuffled"]
            captions[name] = {domain: found["perplexity"][domain] for domain in shuffled[name]}
    return {
        "ln_vocabulary": float(np.log(vocabulary)),
        "text_nll": text,
        "caption_nll": captions,
        "caption_nll_shuffled": shuffled,
    }


def to_state(tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(tensors[name])) for name in tensors}


def sweep_figures(root: Path) -> list[dict[str, float]]:
    """Both caption domains and text for every beta: theta = beta real + (1 - beta) synthetic, nothing written."""
    a, b = (str(root / "sphinx" / name) for name in ("real", "synthetic"))
    objective, stage = load_trained(a)
    tokenizer = stage_tokenizer(stage)
    rows = []
    for beta in BETAS:
        load_into(objective.model, to_state(interpolated(a, b, beta)), f"beta {beta}")
        nll = evaluate(objective, objective.model, stage, tokenizer, ALONE)["perplexity"]
        rows.append({"beta": beta} | {f"nll_{name}": nll[name] for name in ("real", "synthetic", "text")})
    return rows


TEXT_AS = {"lm": "before", "real": "with_text", "real_no_text": "without_text"}
