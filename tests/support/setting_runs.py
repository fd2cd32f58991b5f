"""Two small training stages, and one process that trains them again and again, each time with other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.sources.tar import TarWriter
from tests.support.samples import encode, pixels, write_packed, write_tokenizer
from tests.support.tiny import write_recipe
from tests.support.tiny_models import LLAMA

STEPS = 3
LENGTH = 10
Run = dict[str, Any]


def make_data(root: Path) -> None:
    """pairs, more, held: captioned images with several scored captions; words and other: tokenizers; text, read."""
    from data_pipeline.index.build import build_index
    from data_pipeline.index.build_view import Rule, build_view

    for number, (name, count) in enumerate((("pairs", 16), ("more", 6), ("held", 12))):
        write_pairs(root / name, number, count)
    write_packed(root / "text", [9], LENGTH)
    write_packed(root / "read", [4], LENGTH)
    write_tokenizer(root / "words")
    backwards = json.loads((root / "words" / "tokenizer.json").read_text())
    words = backwards["model"]["vocab"]
    ordinary = [word for word in words if not word.startswith("<|")]
    numbers = [words[word] for word in ordinary]
    words |= dict(zip(ordinary, reversed(numbers), strict=True))
    (root / "other").mkdir()
    (root / "other" / "tokenizer.json").write_text(json.dumps(backwards))
    build_index(str(root / "pairs"), 1)
    (root / "ids").write_text("\n".join(f"{index:09d}" for index in range(0, 16, 2)))
    build_view(str(root / "pairs"), "half", Rule(ids=str(root / "ids")), 1)


def write_pairs(folder: Path, number: int, count: int) -> None:
    """Images of 24 x 20 pixels; one is larger, and one cannot be decoded."""
    folder.mkdir()
    with TarWriter(folder / "00000.tar") as tar:
        for index in range(count):
            size = (30, 40) if index == 2 else (20, 24)
            colours = [f"a {colour} dot of number {index % 10}" for colour in ("red", "blue", "blue blue")]
            fields = {
                "all": colours,
                "scores": [0.1, 0.9, 0.5],
                "label": str(index % 3),
                "kind": str(index % 2),
            }
            image = encode(pixels(number, index, *size)) if index != 5 else b"broken"
            tar.write(
                f"{index:09d}",
                {"png": image, "txt": f"dot {index % 10}".encode(), "json": json.dumps(fields).encode()},
            )


def flip(root: Path) -> Run:
    return {
        "run": {"dir": str(root / "runs" / "flip"), "seed": 3},
        "data": {
            "pairs": {
                "sources": {"a": str(root / "pairs"), "b": str(root / "more")},
                "batch": 8,
                "image": {"size": 12, "crop": [0.5, 1.0]},
                "text": {
                    "tokenizer": str(root / "words"),
                    "length": LENGTH,
                    "captions": {"from": ["json.all"], "scores": ["json.scores"], "top": 2},
                },
            }
        },
        "model": {
            "vision": {"width": 16, "layers": 1, "head_width": 8, "patch": 4},
            "text": {"width": 16, "heads": 2, "layers": 1},
        },
        "objective": {"kind": "contrastive", "image_mask": 0.5},
        "optimizer": {"lr": 1e-2, "clip": 1000, "eps": 1e-6, "weight_decay": 0.1},
        "schedule": {"warmup": 0},
        "train": {"steps": STEPS},
        "loader": {"workers": 0},
        "stages": {"other": {}, "main": {}},
    }


def sphinx(root: Path) -> Run:
    shared = flip(root)
    pairs = shared["data"]["pairs"] | {"batch": 4}
    llm = LLAMA | {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return shared | {
        "run": {"dir": str(root / "runs" / "sphinx"), "seed": 3},
        "data": {
            "text": {
                "sources": {"t": str(root / "text")},
                "batch": 4,
                "text": {"format": "packed", "length": LENGTH},
            },
            "pairs": pairs,
        },
        "model": {
            "llm": {"tokenizer": str(root / "words"), "config": llm | {"num_key_value_heads": 2}},
            "vision": {"init": str(root / "runs" / "flip" / "main")},
            "connector": {"kind": "linear", "norm": True},
            "freeze": ["vision"],
        },
        "objective": {"kind": "generative"},
    }


def recipes(root: Path) -> dict[str, Run]:
    """The recipes by name; those with `_eval` evaluate after two steps."""
    classes = {"0": "red", "1": "blue", "2": "dot"}
    zero_shot = {"held": {"path": str(root / "held"), "classes": classes}}
    perplexity = {
        "words": {"path": str(root / "text"), "length": LENGTH},
        "seen": {"path": str(root / "held"), "stream": "pairs"},
    }
    plain = {"flip": flip(root), "sphinx": sphinx(root)}
    short = {"train": {"steps": 2}, "stages": {"main": {}}}
    return plain | {
        "flip_eval": plain["flip"] | short | {"eval": {"zero_shot": zero_shot}},
        "sphinx_eval": plain["sphinx"] | short | {"eval": {"perplexity": perplexity}},
    }


def main(root: str, jobs: list[tuple[str, list[str]]]) -> None:
    """Train ROOT/KIND.yaml once per job (KIND, overrides) in one process group; write ROOT/found.json."""
    import torch

    from pretrain.train.session import Session
    from pretrain.train.stop_signals import StopFlag

    flag, found = StopFlag(), []
    for kind, overrides in jobs:
        torch.use_deterministic_algorithms(False)
        session = None
        try:
            session = Session(str(Path(root, f"{kind}.yaml")), "main", overrides, flag)
            session.train()
            settings = {"deterministic": torch.are_deterministic_algorithms_enabled()}
            found.append(result(session.context.folder) | settings)
        except Exception as error:
            found.append({"error": str(error) or repr(error)})
        finally:
            # Not `close`: DeepSpeed keeps groups of a process group for the life of the process.
            if session is not None and session.trainer is not None:
                session.trainer.close()
            if session is not None and session.lock is not None:
                session.lock.release()
    Path(root, "found.json").write_text(json.dumps(found))


def result(folder: Path) -> Run:
    """What a stage left: its metrics without times, and the names of its checkpoints."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "time"} for row in rows]
    return {
        "rows": rows,
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").glob("step_*")),
    }


def train_all(root: Path, jobs: dict[str, tuple[str, list[str]]]) -> dict[str, Run]:
    """The results of the jobs by name; each has a run folder of its own."""
    from tests.support.forks import fork, free_port, rank_environment, wait_all

    for kind, recipe in recipes(root).items():
        write_recipe(root / f"{kind}.yaml", recipe)
    listed = [
        (kind, [f"run.dir={root / 'runs' / name}", *overrides]) for name, (kind, overrides) in jobs.items()
    ]
    arguments = (str(root), listed)
    wait_all(
        [
            fork(
                "tests.support.setting_runs",
                "main",
                arguments,
                rank_environment(0, 1, free_port()),
                root / "log",
            )
        ]
    )
    return dict(zip(jobs, json.loads((root / "found.json").read_text()), strict=True))
