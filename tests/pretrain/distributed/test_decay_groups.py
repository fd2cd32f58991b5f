"""Which parameters decay: matrices, by a list of names written by hand for real models; each parameter once."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from torch import nn

from pretrain.distributed.engine import ParameterGroup, decay_groups
from tests.support.tiny_models import clip, multimodal

BLOCK = "*transformer.resblocks.?."  # of open_clip's image and text tower
LAYER = "llm.model.layers.?."
# Learned positions are a matrix; fixed (sincos) positions are not trained.
CLIP_DECAYS = [
    *("positional_embedding", "text_projection", "token_embedding.weight"),
    *("visual.positional_embedding", "visual.proj", "visual.conv1.weight"),
    *(
        BLOCK + name
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    ),
]
CLIP_DOES_NOT = [
    *(
        "logit_scale",
        "visual.class_embedding",
        "ln_final.weight",
        "ln_final.bias",
        "visual.ln_pre.*",
        "visual.ln_post.*",
    ),
    *(BLOCK + name for name in ("ln_?.weight", "ln_?.bias", "attn.in_proj_bias", "attn.out_proj.bias")),
    *(BLOCK + name for name in ("mlp.c_fc.bias", "mlp.c_proj.bias")),
]
SPHINX_DECAYS = [
    *("llm.model.embed_tokens.weight", "llm.lm_head.weight", "connector.0.linear.weight"),
    *(LAYER + f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]
SPHINX_DOES_NOT = [
    *(
        "start_image",
        "end_image",
        "connector.0.linear.bias",
        "connector.0.norm.weight",
        "connector.0.norm.bias",
    ),
    *("llm.model.norm.weight", LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"),
]


def names(model: nn.Module, decay: float = 0.3) -> tuple[list[str], list[str]]:
    """Names of the parameters that decay, and of those that do not; each in exactly one group."""
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    found: tuple[list[str], list[str]] = ([], [])
    for group in decay_groups(model, decay):
        assert group["weight_decay"] in (decay, 0.0)
        found[group["weight_decay"] == 0.0].extend(of[id(parameter)] for parameter in group["params"])
    assert len(set(found[0] + found[1])) == len(found[0] + found[1])
    return found


def check(model: nn.Module, decays: list[str], does_not: list[str], frozen: tuple[str, ...] = ()) -> None:
    """Every trained parameter is in the group in which a pattern puts it, and every pattern stands for something."""
    trained = [name for name, _ in model.named_parameters() if not fnmatch_any(name, frozen)]
    for patterns, other, found in zip((decays, does_not), (does_not, decays), names(model), strict=True):
        assert sorted(found) == sorted(name for name in trained if fnmatch_any(name, patterns))
        assert not [name for name in found if fnmatch_any(name, other)]
        for pattern in patterns:
            assert fnmatch_any(pattern, frozen) or any(fnmatch(name, pattern) for name in found), pattern


def fnmatch_any(name: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def test_of_two_towers() -> None:
    check(clip({}), CLIP_DECAYS, CLIP_DOES_NOT)


def test_fixed_positions_and_frozen_parts_are_in_no_group() -> None:
    model = clip({"positions": "sincos"})
    for name, parameter in model.named_parameters():
        if name.startswith("transformer."):
            parameter.requires_grad_(False)
    check(model, CLIP_DECAYS, CLIP_DOES_NOT, ("visual.positional_embedding", "transformer.*"))


def test_of_a_language_model_with_connector_and_delimiters() -> None:
    check(multimodal(), SPHINX_DECAYS, SPHINX_DOES_NOT)


def test_tied_weights_are_one_parameter() -> None:
    model = multimodal(tie_word_embeddings=True)
    check(model, SPHINX_DECAYS, SPHINX_DOES_NOT, ("llm.lm_head.weight",))


def test_a_frozen_language_model_leaves_the_connector() -> None:
    model = multimodal()
    model.llm.requires_grad_(False)
    assert names(model) == (["connector.0.linear.weight"], ["start_image", "end_image", "connector.0.linear.bias",
                                                     "connector.0.norm.weight", "connector.0.norm.bias"])  # fmt: skip


def test_a_matrix_has_two_sides_longer_than_one() -> None:
    """Single learned tokens and scales written as matrices do not decay; an empty group is left out."""
    shapes = {(1, 1, 8): False, (8, 1): False, (1,): False, (): False, (1, 1): False, (8,): False}
    shapes |= {(2, 2): True, (1, 3, 4): True, (8, 3, 4, 4): True, (2, 1, 2): True}
    model = nn.ParameterDict({str(n): nn.Parameter(torch.zeros(shape)) for n, shape in enumerate(shapes)})
    decaying, _ = names(model)
    assert [shapes[shape] for shape in shapes] == [str(n) in decaying for n in range(len(shapes))]
    assert [len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)), len(decay_groups(nn.LayerNorm(2), 0.1))] == [
        1,
        1,
    ]


def test_groups_have_their_own_decay_and_vectors_none() -> None:
    model = multimodal()
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [frozenset(name for name in of.values() if f".layers.{layer}." in name) for layer in (0, 1)]
    groups = [ParameterGroup(layers[0], 0.5), ParameterGroup(layers[0] | layers[1], 0.0)]
    found = {
        (group["rate"], group["weight_decay"], name)
        for group in decay_groups(model, 0.3, groups)
        for name in (of[id(parameter)] for parameter in group["params"])
    }
    decaying = set(names(model)[0])
    expected = set()
    for name in of.values():
        rate = 1 if name in layers[0] else 2 if name in layers[1] else 0
        expected.add((rate, (0.3, 0.5, 0.0)[rate] if name in decaying else 0.0, name))
    assert found == expected
    assert sum(len(group["params"]) for group in decay_groups(model, 0.3, groups)) == len(of)
