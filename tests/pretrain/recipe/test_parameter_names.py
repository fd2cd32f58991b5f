"""Expressions over parameter names: what they match, the messages where they match nothing, names on few lines."""

from __future__ import annotations

import random
import re

import pytest

from pretrain.recipe.parameter_names import (
    SHORT_NAMES,
    SINGLE_WORDS,
    expression_mistake,
    expressions,
    folded,
    matching,
    no_match,
)
from tests.support.tiny_models import clip, multimodal

LAYERS = [f"llm.model.layers.{layer}.{part}.weight" for layer in range(3) for part in ("q", "k", "norm")]
REST = ["llm.model.embed_tokens.weight", "llm.lm_head.weight"]


def test_every_parameter_of_the_models_belongs_to_one_short_name() -> None:
    """But the logit scale, which belongs to both towers."""
    for model in (clip({}), multimodal()):
        for name, _ in model.named_parameters():
            found = [short for short in SHORT_NAMES if matching(short, [name])]
            assert len(found) == (name != "logit_scale"), (name, found)
            assert "." in name or name in SINGLE_WORDS


def test_an_expression_matches_whole_names() -> None:
    assert matching(r"llm\.model\.layers\.[12]\..*", LAYERS + REST) == LAYERS[3:]
    assert matching("llm", LAYERS + REST + ["connector.0.linear.bias"]) == LAYERS + REST
    assert matching(r"llm\.lm_head", REST) == []


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("visoin", "'visoin' matches no parameter; did you mean 'vision'?"),
        ("eyes", "'eyes' matches no parameter. Write vision, text, connector, llm, or a regular expression"),
        (r"llm\.(", "is not a valid regular expression: missing )"),
        ("", "'' matches no parameter"),
        ("vision", None),
        ("start_image", None),
        (r"llm\.model\.norm\.weight", None),
    ],
)
def test_what_the_text_of_an_expression_tells(expression: str, words: str | None) -> None:
    mistake = expression_mistake(expression)
    assert (mistake is None) if words is None else (words in str(mistake))


def test_the_nearest_names_are_named() -> None:
    text = no_match(r"llm\.model\.layer\.1\..*", [*LAYERS, *REST, "connector.0.linear.bias"])
    assert text.startswith(r"'llm\\.model\\.layer\\.1\\..*' matches no parameter; nearest: llm.model.layers,")
    assert text.endswith("short names: connector, llm")


@pytest.mark.parametrize(
    ("names", "others", "lines"),
    [
        (LAYERS[3:], LAYERS[:3] + REST, ["llm.model.layers.{1..2}.* (6 tensors)"]),
        (LAYERS[:3] + LAYERS[6:], LAYERS[3:6], ["llm.model.layers.{0,2}.* (6 tensors)"]),
        (LAYERS[::3], LAYERS[1::3] + REST, ["llm.model.layers.{0..2}.q.weight (3 tensors)"]),
        (LAYERS + REST, ["connector.0.linear.bias"], ["llm.* (11 tensors)"]),
        (["start_image", "connector.0.linear.bias"], [], ["connector.0.linear.bias", "start_image"]),
        (
            ["a.0.b.1.w", "a.0.b.2.w", "a.1.b.1.w"],
            ["a.0.b.0.w", "a.1.b.0.w"],
            ["a.0.b.{1..2}.w (2 tensors)", "a.1.b.1.w"],
        ),
        ([], REST, []),
    ],
)  # fmt: skip
def test_names_are_folded(names: list[str], others: list[str], lines: list[str]) -> None:
    assert folded(names, others) == lines


def test_the_expressions_of_a_fold_match_its_names_and_no_others() -> None:
    """On random parts of real models."""
    generator = random.Random(5)
    names = [name for model in (clip({}), multimodal()) for name, _ in model.named_parameters()]
    for _ in range(200):
        share = generator.random()
        chosen = [name for name in names if generator.random() < share]
        others = [name for name in names if name not in chosen]
        found = expressions(chosen, others)
        assert len(found) == len(folded(chosen, others)) <= len(chosen)
        assert [name for name in names if any(re.fullmatch(each, name) for each in found)] == chosen
