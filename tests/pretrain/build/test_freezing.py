"""What trains: expressions over names, groups of the optimizer, streams without a trained parameter, the table."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.build.freezing import apply_freeze, check_streams_train, group_names, training_table
from pretrain.recipe.schema import Optimizer, TrainStage
from tests.support.tiny_models import clip, multimodal

FREE = [
    "connector.0.linear.weight",
    "connector.0.linear.bias",
    "connector.0.norm.weight",
    "connector.0.norm.bias",
    "start_image",
    "end_image",
]


class Captioner:
    """The objective of a language model with a frozen tower beside it, on a stream of text and one of captions."""

    streams = ("text", "captions")

    def __init__(self, **config: Any) -> None:
        self.model = multimodal(**config)

    def frozen(self) -> dict[str, Tensor]:
        tensors = {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
        return tensors | {"vision.0.conv1.weight": torch.zeros(8, 3)}


class TwoTowers:
    streams = ("pairs",)

    def __init__(self) -> None:
        self.model: nn.Module = clip({})

    def frozen(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}


def stage(*groups: dict[str, Any], freeze: list[str] | None = None, **streams: bool) -> TrainStage:
    """A stage with these streams: True for one with images."""
    data = {
        name: {"sources": {"a": "x"}}
        | ({"image": {"size": 16}, "text": {}} if images else {"text": {"format": "packed", "length": 8}})
        for name, images in (streams or {"text": False, "captions": True}).items()
    }
    optimizer = {"lr": 0.01, "weight_decay": 0.2} | ({"groups": list(groups)} if groups else {})
    given = {"objective": {"kind": "generative"}, "train": {"steps": 1}, "data": data, "optimizer": optimizer}
    return TrainStage.model_validate(given | {"model": {"freeze": freeze or []}})


def trained(objective: Any) -> set[str]:
    return {name for name, parameter in objective.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "expression",
    ["llm", r"llm\.model\.layers\.1\..*", r".*\.(q|k)_proj\.weight", "connector", r"(start|end)_image"],
)
def test_what_an_expression_matches_does_not_train(expression: str) -> None:
    objective: Any = Captioner()
    every = trained(objective)
    pattern = {"llm": r"llm\..*", "connector": r"connector\..*|start_image|end_image"}.get(
        expression, expression
    )
    apply_freeze(objective, [expression])
    assert every - trained(objective) == {name for name in every if re.fullmatch(pattern, name)} != set()


def test_vision_is_the_tower_beside_the_model() -> None:
    objective: Any = Captioner()
    every = trained(objective)
    apply_freeze(objective, ["vision", r"vision\.0\.conv1\..*"])
    assert trained(objective) == every


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("text", "'text' matches no parameter; nearest: .*; short names: vision, connector, llm"),
        ("visual", "'visual' matches no parameter; nearest: .*vision"),
        (r"llm\.layers\.0\..*", r"nearest: llm\.model\.layers"),
        (r"llm\.model", "matches no parameter; nearest: llm"),  # a module is no parameter
        (r"llm\.(", "is not a valid regular expression"),
    ],
)
def test_an_expression_that_matches_nothing_is_refused_with_the_nearest_names(
    expression: str, words: str
) -> None:
    objective: Any = Captioner()
    with pytest.raises(UserError, match=rf"^model\.freeze: .*{words}"):
        apply_freeze(objective, [expression])
    with pytest.raises(UserError, match=rf"^optimizer\.groups\.0\.match: .*{words}"):
        group_names(objective, stage({"match": expression, "lr": 1}).optimizer)


def test_a_tied_weight_has_all_its_names() -> None:
    objective: Any = Captioner(tie_word_embeddings=True)
    apply_freeze(objective, [r"llm\.lm_head\.weight"])
    assert "llm.model.embed_tokens.weight" not in trained(objective)
    other: Any = Captioner(tie_word_embeddings=True)
    (found,) = group_names(other, stage({"match": r"llm\.lm_head\.weight", "lr": 1}).optimizer)
    assert found == {"llm.lm_head.weight", "llm.model.embed_tokens.weight"}


def test_a_parameter_belongs_to_the_first_group_that_matches_it() -> None:
    objective: Any = Captioner()
    apply_freeze(objective, [r".*layernorm\.weight"])
    optimizer = stage(
        {"match": r"llm\.model\.layers\.0\..*", "lr": 1},
        {"match": "llm", "lr_scale": 2},
        {"match": "connector", "lr": 3},
    ).optimizer
    first, llm, connector = group_names(objective, optimizer)
    names = trained(objective)
    assert first == {name for name in names if name.startswith("llm.model.layers.0.")}
    assert llm == {name for name in names if name.startswith("llm.")} - first
    assert connector == set(FREE)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"match": "vision", "lr": 1}], r"groups\.0\.match: 'vision' matches only frozen parameters"),
        (
            [{"match": "llm", "lr": 1}, {"match": r".*q_proj\.weight", "lr": 1}],
            r"groups\.1\.match: .*earlier group",
        ),
    ],
)
def test_a_group_without_effect_is_refused(groups: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        group_names(Captioner(), stage(*groups).optimizer)  # type: ignore[arg-type]


def loss_has_a_gradient(objective: Any, stream: str) -> bool:
    tokens = torch.tensor([[1, 4, 5, 2]])
    features = torch.zeros(1, 3, 16).double() if stream == "captions" else None
    return bool(objective.model(tokens, torch.tensor([4]), features).sum().requires_grad)


@pytest.mark.parametrize(
    "freeze", [[], ["llm"], ["connector"], ["llm", "connector"], [r"llm\.model\..*"], [r".*"]]
)
def test_a_stream_without_a_trained_parameter_is_refused_where_autograd_would_fail(freeze: list[str]) -> None:
    for stream, images in (("text", False), ("captions", True)):
        objective: Any = Captioner()
        objective.streams = (stream,)
        of = stage(freeze=freeze, **{stream: images})
        apply_freeze(objective, freeze)
        if loss_has_a_gradient(objective, stream):
            check_streams_train(objective, of)
        else:
            with pytest.raises(UserError, match=rf"^data\.{stream}: no parameter .*{re.escape(freeze[0])}"):
                check_streams_train(objective, of)


def test_the_table_counts_every_parameter_once_with_its_rate() -> None:
    objective: Any = Captioner()
    groups = (
        {"match": r"llm\.lm_head\.weight", "lr": 0.5, "weight_decay": 0, "warmup": "8 samples"},
        {"match": "connector", "lr_scale": 0.1},
    )
    apply_freeze(objective, [r"llm\.model\.layers\.0\..*"])
    title, *lines = training_table(objective, stage(*groups), 0.02)
    sizes = {name: p.numel() for name, p in objective.model.named_parameters()}
    frozen = sum(size for name, size in sizes.items() if name.startswith("llm.model.layers.0."))
    head, connector = sizes["llm.lm_head.weight"], sum(sizes[name] for name in FREE)
    llm = sum(sizes.values()) - frozen - head - connector
    assert title == f"trains {llm + head + connector:,} of {sum(sizes.values()) + 24:,} parameters"
    assert {tuple(re.split(r"\s{2,}", line.strip())) for line in lines} == {
        ("llm", "lr 0.02, weight_decay 0.2", f"{llm:,} parameters"),
        ("llm", "frozen", f"{frozen:,} parameters"),
        ("llm", r"lr 0.5, weight_decay 0, warmup 8 samples (llm\.lm_head\.weight)", f"{head:,} parameters"),
        ("connector", "lr 0.002, weight_decay 0.2 (connector)", f"{connector:,} parameters"),
        ("vision", "frozen", "24 parameters"),
    }


def test_the_towers_of_a_contrastive_model_and_its_scale_are_parts() -> None:
    objective: Any = TwoTowers()
    apply_freeze(objective, ["text"])
    check_streams_train(objective, stage(pairs=True))
    _, *lines = training_table(objective, stage(pairs=True), 0.01)
    assert [tuple(line.split()[:2]) for line in lines] == [
        ("text", "frozen"),
        ("logit_scale", "lr"),
        ("vision", "lr"),
    ]
    apply_freeze(objective, ["vision"])
    check_streams_train(objective, stage(pairs=True))  # the logit scale trains
    apply_freeze(objective, ["logit_scale"])
    with pytest.raises(UserError, match=r"data\.pairs: no parameter"):
        check_streams_train(objective, stage(pairs=True))


def test_a_rate_and_a_factor_are_the_same() -> None:
    groups = [
        {"match": "llm", "lr": 0.003},
        {"match": "llm", "lr_scale": 0.3},
        {"match": "llm", "weight_decay": 0},
    ]
    optimizer = Optimizer.model_validate({"lr": 0.01, "groups": groups})
    assert [group.scale(0.01) for group in optimizer.groups or []] == pytest.approx([0.3, 0.3, 1.0])
