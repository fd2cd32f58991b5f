"""Tiny data and recipes for tests: JPEGs in tars with captions, packed text, a tokenizer; written in a second."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_pipeline.prepare.train_tokenizer import train_tokenizer
from data_pipeline.sources.tar import TarWriter

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (240, 240, 240)}
SIZE = 16
LENGTH = 24


def picture(colour: str, number: int) -> bytes:
    """JPEG of a coloured square whose position depends on the number."""
    pixels = np.full((SIZE, SIZE, 3), number * 7 % 60, np.uint8)
    x, y = number % 8, number // 8 % 8
    pixels[y : y + 8, x : x + 8] = COLOURS[colour]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_pairs(folder: Path, shards: int = 3, samples: int = 17) -> None:
    names = list(COLOURS)
    for shard in range(shards):
        with TarWriter(folder / f"{shard:05d}.tar") as tar:
            for index in range(samples - shard):
                number = shard * samples + index
                colour = names[number % len(names)]
                members = {
                    "jpg": picture(colour, number),
                    "txt": f"a {colour} square number {number}".encode(),
                    "json": json.dumps({"label": colour}).encode(),
                }
                tar.write(f"{shard:05d}{index:04d}", members)


def write_text(folder: Path, samples: int = 30, vocabulary: int = 300) -> None:
    generator = np.random.default_rng(0)
    with TarWriter(folder / "00000.tar") as tar:
        for index in range(samples):
            content = io.BytesIO()
            row = generator.integers(3, vocabulary, LENGTH).astype(np.uint16)
            row[0] = 1
            np.save(content, row)
            tar.write(f"{index:09d}", {"npy": content.getvalue(), "json": b"{}"})


def make_data(root: Path) -> None:
    """Write `root/{pairs,text,tokenizer}`."""
    for name in ("pairs", "text", "tokenizer"):
        (root / name).mkdir(parents=True)
    write_pairs(root / "pairs")
    write_text(root / "text")
    captions = [f"a {colour} square number {n}" for n in range(60) for colour in COLOURS]
    train_tokenizer(captions, str(root / "tokenizer"), vocabulary=300)


def pairs_stream(root: Path, batch: int = 8) -> dict[str, Any]:
    return {
        "sources": {"pairs": str(root / "pairs")},
        "batch": batch,
        "image": {"size": SIZE, "crop": [0.7, 1.0]},
        "text": {"tokenizer": str(root / "tokenizer"), "length": LENGTH},
    }


def flip_recipe(root: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": {"name": "flip", "dir": str(root / "runs" / "flip"), "seed": 3},
        "data": {"pairs": pairs_stream(root)},
        "model": {
            "embed": 16,
            "vision": {
                "width": 32,
                "layers": 2,
                "head_width": 16,
                "patch": 4,
                "positions": "sincos",
                "pool": "avg",
            },
            "text": {"width": 32, "heads": 2, "layers": 1, "causal": True},
        },
        "objective": {"kind": "contrastive", "image_mask": 0.5},
        "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.1, "clip": 0},
        "schedule": {"kind": "cosine", "warmup": 3},
        "train": {"steps": 20},
        "engine": {"zero": 1},
        "loader": {"workers": 0},
        "checkpoint": {"every": 5},
        **sections,
    }


def sphinx_recipe(root: Path, **sections: Any) -> dict[str, Any]:
    """A recipe with text before captions: the connector's first gradient comes from the second stream."""
    return {
        "run": {"name": "sphinx", "dir": str(root / "runs" / "sphinx"), "seed": 3},
        "data": {
            "text": {
                "sources": {"text": str(root / "text")},
                "batch": 4,
                "text": {"format": "packed", "length": LENGTH},
            },
            "captions": pairs_stream(root),
        },
        "model": {
            "llm": {
                "tokenizer": str(root / "tokenizer"),
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 128,
                    "tie_word_embeddings": False,
                },
            },
            "vision": {"init": "flip/main"},
            "connector": {"kind": "linear", "norm": True},
            "freeze": ["vision"],
        },
        "objective": {"kind": "generative", "weights": {"text": 0.7, "captions": 1.3}},
        "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.1, "clip": 0.3},
        "schedule": {"kind": "cosine", "warmup": 3},
        "train": {"steps": 20},
        "engine": {"zero": 1},
        "loader": {"workers": 0},
        "checkpoint": {"every": 5},
        **sections,
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
