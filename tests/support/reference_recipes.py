"""Data and recipes for runs beside the reference trainer: tars by tarfile, three FLIP and three SPHINX recipes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.prepare.train_tokenizer import train_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (240, 240, 240)}
SIZE, LENGTH, PACKED = 16, 14, 12
VOCABULARY = 290
STEPS = 10
TOWER_WIDTH = 16
LOGIT_SCALE = {"flip": 3.0, "clamped": 4.9, "uneven_flip": 3.0}  # ln 100 is 4.605
# Sample number -> members that make it unusable.
BROKEN: dict[int, dict[str, bytes]] = {
    5: {"png": b"\x89PNG broken", "txt": b"a broken picture"},
    11: {"txt": b"no picture"},
    17: {"txt": b"  "},
}


def picture(number: int, colour: str) -> Image.Image:
    """A coloured square on noise, 20 to 27 pixels wide, 18 to 22 high."""
    generator = np.random.default_rng([7, number])
    pixels = generator.integers(0, 120, (18 + number % 5, 20 + number % 8, 3), dtype=np.uint8)
    x, y = generator.integers(0, 10, 2)
    pixels[y : y + 8, x : x + 9] = COLOURS[colour]
    return Image.fromarray(pixels)


def sample(number: int) -> dict[str, bytes]:
    """Members of a sample: odd ones are PNG, even ones JPEG; every sixth repeats a caption, some are cut."""
    colour = list(COLOURS)[number % 4]
    out = io.BytesIO()
    kind = "PNG" if number % 2 else "JPEG"
    picture(number, colour).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    caption = f"a {colour} square" + f" number {number}" * (number % 3) + " " * (number % 2)
    if number % 6 == 0:
        caption = "a picture"
    others = [f"{colour} on noise", "", f"square {number}"]
    return {
        "png" if number % 2 else "jpg": out.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps({"label": colour, "others": others}).encode(),
    }


def packed(number: int) -> dict[str, bytes]:
    row = np.random.default_rng([9, number]).integers(3, VOCABULARY, PACKED).astype(np.uint16)
    row[0] = 1
    out = io.BytesIO()
    np.save(out, row)
    return {"npy": out.getvalue()}


def write_tars(folder: Path, shards: list[list[dict[str, bytes]]]) -> None:
    folder.mkdir(parents=True)
    for shard, samples in enumerate(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index, members in enumerate(samples):
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{index:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def make_data(root: Path) -> None:
    """`pairs` (27 samples, 3 of them unusable), `few` (3 samples), `held_out`, `text`, `web`, `tokenizer`."""
    usable = {number: sample(number) for number in range(60)}
    many = [usable[number] | {} if number not in BROKEN else broken(number) for number in range(27)]
    write_tars(root / "pairs", [many[:12], many[12:21], many[21:]])
    write_tars(root / "few", [[usable[number] for number in (30, 31, 32)]])
    write_tars(root / "held_out", [[usable[number] for number in range(28, 50)], [broken(11), usable[51]]])
    write_tars(root / "text", [[packed(number) for number in range(9)], [packed(9)]])
    write_tars(root / "web", [[packed(number) for number in range(20, 27)]])
    captions = [usable[number]["txt"].decode() for number in range(60)]
    (root / "tokenizer").mkdir()
    train_tokenizer(captions * 9, str(root / "tokenizer"), vocabulary=VOCABULARY)


def broken(number: int) -> dict[str, bytes]:
    kept = {} if "png" in BROKEN[number] or number == 11 else {"jpg": sample(number - 1)["jpg"]}
    return kept | BROKEN[number] | {"json": b"{}"}


def pairs_stream(root: Path) -> dict[str, Any]:
    """Two sources: `few` repeats inside a batch, so that rows of one batch are twins."""
    return {
        "sources": {
            "pairs": {"path": str(root / "pairs"), "weight": 5},
            "few": {"path": str(root / "few"), "weight": 3},
        },
        "batch": {0: 8, 4: 12},
        "lanes": 4,
        "image": {"size": SIZE, "crop": [0.4, 1.0], "flip": True},
        "text": {"tokenizer": str(root / "tokenizer"), "length": LENGTH},
    }


def flip(root: Path, init: str, tower: str = "") -> dict[str, Any]:
    """Few patches, twins, two sources, a ramp-up, active clipping, decay that shows, every default changed."""
    return {
        "run": {"name": "flip", "dir": str(root / "runs" / "flip"), "seed": 3},
        "init": init,
        "data": {"pairs": pairs_stream(root)},
        "model": {
            "embed": 12,
            "vision": {
                "width": TOWER_WIDTH, "layers": 2, "head_width": 8, "patch": 4, "positions": "sincos", "pool": "avg",
            },
            "text": {"width": 16, "heads": 2, "layers": 1, "causal": True},
        },
        "objective": {"kind": "contrastive", "image_mask": 0.75},
        "optimizer": {
            "kind": "adamw", "lr_per_256": 0.05, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 2.0, "clip": 1.5,
        },
        "schedule": {"kind": "cosine", "warmup": "20 samples", "final_lr": 1e-3},
        "eval": {
            "every": 2,
            "batch": 4,
            "zero_shot": {
                "colours": {
                    "path": str(root / "held_out"),
                    "classes": {name: f"{name} square" for name in COLOURS},
                    "templates": ["a {}", "{} number 3"],
                }
            },
        },
        **common(),
    }  # fmt: skip


def clamped(root: Path, init: str, tower: str = "") -> dict[str, Any]:
    """A logit scale above the clamp, learned positions, class token, text that sees all tokens, a frozen text tower."""
    recipe = flip(root, init)
    recipe["run"] = {"name": "clamped", "dir": str(root / "runs" / "clamped"), "seed": 5}
    stream = recipe["data"]["pairs"]
    stream["sources"], stream["batch"] = {"pairs": str(root / "pairs")}, 6
    stream["image"] = {"size": SIZE, "crop": [0.2, 0.6], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    stream.pop("lanes")
    recipe["model"]["vision"] |= {"positions": "learnable", "pool": "tok"}
    recipe["model"]["text"]["causal"] = False
    recipe["model"]["freeze"] = ["text"]
    recipe["objective"]["image_mask"] = 0.4
    recipe["optimizer"] = {"kind": "adamw", "lr": 5e-3, "weight_decay": 3.0, "clip": 0, "eps": 1e-2}
    recipe["schedule"] = {"kind": "linear", "warmup": 2}
    return recipe


def sphinx(root: Path, init: str, tower: str) -> dict[str, Any]:
    """Text before captions: under ZeRO-3 the connector's first gradient comes from the third stream."""
    captions = pairs_stream(root) | {"batch": 8}
    captions["text"] = captions["text"] | {"captions": {"from": ["txt", "json.others"]}}
    return {
        "run": {"name": "sphinx", "dir": str(root / "runs" / "sphinx"), "seed": 4},
        "init": init,
        "data": {
            "captions": captions,
            "text": {
                "sources": {"text": str(root / "text"), "web": {"path": str(root / "web"), "repeat": 2}},
                "batch": {0: 4, 6: 6},
                "share_by": "sqrt",
                "text": {"format": "packed", "length": PACKED},
            },
            "web": {"sources": {"web": str(root / "web")}, "batch": 2, "text": {"format": "packed", "length": PACKED}},
        },
        "model": {
            "llm": {
                "tokenizer": str(root / "tokenizer"),
                "config": {
                    "model_type": "llama",
                    "hidden_size": 24,
                    "intermediate_size": 40,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 64,
                    "tie_word_embeddings": False,
                },
            },
            "vision": {"init": tower},
            "connector": {"kind": "linear", "norm": True},
            "freeze": ["vision"],
        },
        "objective": {"kind": "generative", "weights": {"text": 0.7, "captions": 1.6}},
        "optimizer": {
            "kind": "adamw", "lr": 6e-3, "betas": [0.85, 0.92], "eps": 1e-4, "weight_decay": 2.0, "clip": 0.8,
        },
        "schedule": {"kind": "cosine", "warmup": 3, "final_lr": 5e-4},
        "eval": {
            "every": 2,
            "batch": 6,
            "perplexity": {
                "held_out": {"path": str(root / "held_out"), "stream": "captions"},
                "text": {"path": str(root / "text"), "length": PACKED},
            },
        },
        **common(),
    }  # fmt: skip


def connector(root: Path, init: str, tower: str) -> dict[str, Any]:
    """Only connector and image delimiters train; the language model has tied embeddings."""
    recipe = sphinx(root, init, tower)
    recipe["run"] = {"name": "connector", "dir": str(root / "runs" / "connector"), "seed": 6}
    recipe["data"] = {"captions": recipe["data"]["captions"]}
    recipe["model"]["llm"]["config"]["tie_word_embeddings"] = True
    recipe["model"]["freeze"] = ["vision", "llm"]
    recipe["objective"] = {"kind": "generative", "weights": {"captions": 0.5}}
    recipe["optimizer"] = {"kind": "adamw", "lr": 2e-2, "weight_decay": 0.5, "eps": 1e-4, "clip": 0.2}
    recipe["schedule"] = {"kind": "constant", "warmup": "3 steps"}
    recipe["eval"]["perplexity"].pop("text")
    return recipe


def uneven_flip(root: Path, init: str, tower: str = "") -> dict[str, Any]:
    """Batches that neither 2 nor 3 ranks divide, and one row, which has no negative; held-out images one by one."""
    recipe = flip(root, init)
    recipe["run"] = {"name": "uneven_flip", "dir": str(root / "runs" / "uneven_flip"), "seed": 7}
    recipe["data"]["pairs"] |= {"batch": {0: 7, 3: 1, 5: 11}, "lanes": 1}
    recipe["eval"]["batch"] = 1
    return recipe


def uneven_sphinx(root: Path, init: str, tower: str) -> dict[str, Any]:
    """Batches that neither 2 nor 3 ranks divide; of two streams, some ranks have no row."""
    recipe = sphinx(root, init, tower)
    recipe["run"] = {"name": "uneven_sphinx", "dir": str(root / "runs" / "uneven_sphinx"), "seed": 4}
    recipe["data"]["captions"] |= {"batch": 7, "lanes": 7}
    recipe["data"]["text"]["batch"] = {0: 1, 6: 5}
    recipe["data"]["web"]["batch"] = 1
    recipe["eval"]["batch"] = 1
    return recipe


def common() -> dict[str, Any]:
    """Every step is saved: its checkpoint has the gradient of the first step and the weights after the last."""
    return {
        "train": {"steps": STEPS},
        "engine": {"zero": 1},
        "loader": {"workers": 0},
        "checkpoint": {"every": 1, "keep": STEPS},
    }


CASES: dict[str, Callable[[Path, str, str], dict[str, Any]]] = {
    "flip": flip,
    "clamped": clamped,
    "sphinx": sphinx,
    "connector": connector,
    "uneven_flip": uneven_flip,
    "uneven_sphinx": uneven_sphinx,
}
# Cases whose vision tower is that of a trained FLIP.
WITH_TOWER = ("sphinx", "connector", "uneven_sphinx")
