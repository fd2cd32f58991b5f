"""Interpolating two safetensors files: our streaming merge beside a plain torch script."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSORS, SIDE, BETA = 32, 2048, 0.4


def run(rounds: int) -> dict[str, Any]:
    """Megabytes of output a second, bf16."""
    rows: dict[str, float] = {}
    size = TENSORS * SIDE * SIDE * 2 / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate("ab"):
            write_model(folder / model, seed)
        ways: dict[str, Callable[[Path, Path, Path], None]] = {
            "dromos merge (constant memory)": ours,
            "torch, both models in memory": plain,
        }
        for _ in range(rounds):
            for way, merge in ways.items():
                out = folder / "out"
                began = time.perf_counter()
                merge(folder / "a", folder / "b", out)
                rows[way] = max(rows.get(way, 0.0), size / (time.perf_counter() - began))
                shutil.rmtree(out)
    return {"what": f"two bf16 models of {size:,.0f} MB, beta {BETA}", "unit": "MB/s", "rows": rows}


def write_model(folder: Path, seed: int) -> None:
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn(SIDE, SIDE).bfloat16() for i in range(TENSORS)}
    save_file(tensors, folder / "model.safetensors")


def ours(a: Path, b: Path, out: Path) -> None:
    from pretrain.merge import merge

    merge([str(a), str(b)], out, beta=BETA)


def plain(a: Path, b: Path, out: Path) -> None:
    """The script that people write by hand."""
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    mixed = {
        name: (BETA * tensor.float() + (1 - BETA) * second[name].float()).bfloat16()
        for name, tensor in first.items()
    }
    out.mkdir()
    save_file(mixed, out / "model.safetensors")
