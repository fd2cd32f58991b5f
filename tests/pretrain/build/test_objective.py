"""What `model.freeze` excludes from training, by name, and which weights a new model starts with."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.build.module_weights import write_frozen
from pretrain.build.objective import build
from pretrain.objectives.base import Objective
from pretrain.recipe.schema import TrainStage
from tests.support.samples import write_tokenizer
from tests.support.tiny_models import LLAMA, SIZE, TEXT, VISION, clip, clip_config_of

FLIP_PARTS = {
    "vision": ["visual.*"],
    "text": [
        "transformer.*",
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.*",
        "text_projection",
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def stage(kind: str, tokenizer: str, **model: Any) -> TrainStage:
    text = {"tokenizer": tokenizer, "length": 8}
    pairs = {"sources": {"a": "x"}, "image": {"size": SIZE}, "text": text}
    given: dict[str, Any] = {
        "contrastive": {"data": {"pairs": pairs}, "model": {"vision": VISION, "text": TEXT, "embed": 8}},
        "generative": {
            "data": {"text": {"sources": {"a": "x"}, "text": {"format": "packed", "length": 8}}},
            "model": {"llm": {"tokenizer": tokenizer, "config": LLAMA}},
        },
    }[kind]
    given["model"] |= model
    return TrainStage.model_validate(given | {"objective": {"kind": kind}, "train": {"steps": 1}})


def made(stage: TrainStage, name: str = "main", seed: int = 3) -> Objective:
    return build(stage, name, seed, None)[0]


def weights(objective: Objective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in objective.model.state_dict().items()}


@pytest.mark.parametrize("parts", [[], ["vision"], ["text"], ["vision", "text"]])
def test_a_frozen_part_is_exactly_its_tower(parts: list[str], tokenizer: str) -> None:
    objective = made(stage("contrastive", tokenizer, freeze=parts))
    patterns = [pattern for part in parts for pattern in FLIP_PARTS[part]]
    for name, parameter in objective.model.named_parameters():
        assert parameter.requires_grad != any(fnmatch(name, pattern) for pattern in patterns), name
    every = [pattern for part in FLIP_PARTS.values() for pattern in part] + ["logit_scale"]
    for name, _ in objective.model.named_parameters():
        assert sum(fnmatch(name, pattern) for pattern in every) == 1, name


def test_a_frozen_language_model_trains_nothing_of_it(tokenizer: str) -> None:
    for parts in ([], ["llm"]):
        objective = made(stage("generative", tokenizer, freeze=parts))
        assert {p.requires_grad for p in objective.model.parameters()} == {not parts}


def test_an_unknown_part_is_refused(tokenizer: str) -> None:
    with pytest.raises(
        UserError, match=r"'eyes' matches no parameter; nearest: .*; short names: vision, text"
    ):
        made(stage("contrastive", tokenizer, freeze=["eyes"]))


@pytest.mark.parametrize("kind", ["contrastive", "generative"])
def test_new_weights_follow_from_seed_and_stage_alone(kind: str, tokenizer: str) -> None:
    first = weights(made(stage(kind, tokenizer)))
    torch.manual_seed(99)
    again = weights(made(stage(kind, tokenizer)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (made(stage(kind, tokenizer), name="tuned"), made(stage(kind, tokenizer), seed=4)):
        found = weights(other)
        large = [name for name in first if first[name].numel() > 100 and first[name].std() > 0]
        assert large
        assert not [name for name in large if torch.equal(first[name], found[name])]


def test_the_language_model_does_not_depend_on_the_tower_before_it(tokenizer: str, tmp_path: Path) -> None:
    """With and without a tower its new weights are the same: the tower's own random numbers do not count."""
    tower = clip({}).float().visual.state_dict()
    frozen = tmp_path / "frozen.safetensors"
    described = {"kind": "stage", "clip": clip_config_of({})}
    write_frozen(frozen, {f"vision.0.{name}": t for name, t in tower.items()}, described)
    with_tower = build(
        stage("generative", tokenizer, vision={"init": "x"}, connector={"norm": True}),
        "main",
        3,
        None,
        frozen,
    )[0]
    found, alone = weights(with_tower), weights(made(stage("generative", tokenizer)))
    assert {name.split(".")[0] for name in set(found) - set(alone)} == {
        "connector",
        "start_image",
        "end_image",
        "vision",
    }
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    shapes = {f"vision.0.{name}": tensor.shape for name, tensor in tower.items()}
    assert {name: t.shape for name, t in found.items() if name.startswith("vision.")} == shapes


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"attention_dropout": 0.1}, r"model\.llm\.config\.attention_dropout: 0\.1"),
        ({"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 1}, "pdrop: 0.1"),  # by default
    ],
)
def test_dropout_is_refused_also_where_it_is_a_default(
    config: dict[str, Any], where: str, tokenizer: str
) -> None:
    with pytest.raises(UserError, match=where):
        made(stage("generative", tokenizer, llm={"tokenizer": tokenizer, "config": LLAMA | config}))
