"""Randomly damaged specs and mergekit files: planned or refused with one UserError, never another exception."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.merge.spec import load_spec, prepare_spec
from tests.pretrain.merge.mergekit.test_plan import FIXTURES

SPECS = [
    "{inputs: [a, b], beta: 0.4, only: layers, copy_rest: B, dtype: bf16, max_shard_size: 1KB}",
    "{method: ties, base: c, inputs: [{path: a, weight: 1, density: 0.5}, {path: b, weight: 2, density: 0.1}]}",
    "{method: soup, inputs: [a, b, c], rules: [{match: mlp, weights: [1, 2, 3]}, {match: norm, copy_from: B}]}",
    "{inputs: [a, b], beta: 1, rules: [{layers: '0:4', curve: [0, 1]}, {match: x, exclude: true}], exclude: q}",
    "{window: {run: a, last: 3, schedule: ema, decay: 0.5}}",
    "{method: slerp, inputs: [a, b], t: 0.3, vocabulary: pad}",
]
ODD: list[Any] = [
    None, True, 0, -1, 1e400, float("nan"), 3.7, "", "a", "nothing/here", "(", [], [[]], [None, {}], {}, {"a": 1},
    "0:3", [0, 1], [1, 0], [4, 9], "1e-3", 2**70, {"filter": 3, "value": "x"}, [{"filter": "mlp", "value": []}],
    [{"value": {"value": 1}}], [True, 0.5], "s3://", "hf://", "union", "base",
]  # fmt: skip


def damaged(value: Any, draw: random.Random) -> Any:
    """The tree with one random change: a value replaced, removed or duplicated, or a key renamed."""
    tree = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in pairs:
            places.append((node, key))
            walk(inner)

    walk(tree)
    deep = [place for place in places if not isinstance(place[0][place[1]], dict | list)]
    node, key = draw.choice(draw.choice([places, deep or places]))
    what = draw.randrange(4)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[draw.choice(["weight", "model", "t", "inputs", "x", "parameters"])] = node.pop(key)
    elif what == 2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(draw.choice(ODD))
    return tree


@pytest.mark.parametrize("seed", range(10))
def test_damaged_files_are_read_or_refused(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FIXTURES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wholes = [yaml.safe_load(text) for text in SPECS]
    wholes += [yaml.safe_load(path.read_text()) for path in sorted(FIXTURES.glob("*.yml"))]
    draw = random.Random(seed)
    ended = {"planned": 0, "refused": 0}
    for number in range(60):
        tree = wholes[number % len(wholes)]
        for _ in range(draw.choice([1, 1, 2])):
            tree = damaged(tree, draw) if tree else tree
        path = tmp_path / f"{number}.yml"
        path.write_text(yaml.safe_dump(tree))
        try:
            prepare_spec(load_spec(path))
            ended["planned"] += 1
        except UserError:
            ended["refused"] += 1
    assert min(ended.values()) > 1, ended
