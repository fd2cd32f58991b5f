"""FLIP's model against towers written out by hand: masks, pools, positions, heads, attention masks, temperature."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from data_pipeline.errors import UserError
from pretrain.models.clip import Clip, clip_config
from pretrain.models.masking import keep_patches
from pretrain.recipe.architectures import arch_mistake
from pretrain.recipe.schema import Model
from pretrain.recipe.sections.data import Image
from pretrain.recipe.sections.text_formats import CaptionOptions
from tests.support import plain_clip
from tests.support.tiny_models import LENGTH, ROWS, SIZE, TEXT, VISION, Words, pictures, randomise, sentences
from tests.support.tiny_models import clip as build
from tests.support.tiny_models import clip_config_of as config


@pytest.mark.parametrize("positions", ["learnable", "sincos"])
@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize(("head_width", "mlp_ratio"), [(8, 4.0), (4, 1.5)])
def test_image_features_are_those_of_a_tower_that_receives_only_the_kept_patches(
    positions: str, pool: str, head_width: int, mlp_ratio: float
) -> None:
    model = build({"positions": positions, "pool": pool, "head_width": head_width, "mlp_ratio": mlp_ratio})
    images, heads = pictures(), VISION["width"] // head_width
    assert model.visual.transformer.resblocks[0].mlp.c_fc.out_features == int(16 * mlp_ratio)
    for ratio, kept in ((0.0, 16), (0.5, 8), (0.75, 4)):
        keep = keep_patches(torch.arange(ROWS) * 7919, model.patches, ratio)
        with torch.no_grad():
            found = model(images=images, keep=keep)["image"]
        places = keep.tolist() if keep is not None else [list(range(16))] * ROWS
        assert {len(row) for row in places} == {kept}
        expected = plain_clip.image_features(model.state_dict(), images, heads, pool, places)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # The last mask must not be seen by the next forward without one, nor by the tower when another model uses it.
    expected = plain_clip.image_features(model.state_dict(), images, heads, pool)
    with torch.no_grad():
        for found in (model.encode_image(images, normalize=True), model(images=images)["image"]):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_gradient_reaches_only_what_the_kept_patches_use() -> None:
    model = build({"pool": "avg"})
    images = pictures().requires_grad_()
    keep = torch.tensor([[0, 3, 9]] * ROWS)
    model(images=images, keep=keep)["image"][:, 0].sum().backward()
    assert images.grad is not None
    cells = images.grad.abs().sum(dim=(0, 1)).reshape(4, 4, 4, 4).sum(dim=(1, 3)).flatten()
    assert cells.nonzero().flatten().tolist() == [0, 3, 9]
    table = model.visual.positional_embedding.grad
    assert table is not None
    assert table.abs().sum(1).nonzero().flatten().tolist() == [
        0,
        1,
        4,
        10,
    ]  # the class token, then the patches


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [3, 2])
def test_text_features_are_those_of_the_end_token(causal: bool, heads: int) -> None:
    model = build({}, {"causal": causal, "heads": heads})
    with torch.no_grad():
        found = model(tokens=sentences())["text"]
    expected = plain_clip.text_features(model.state_dict(), sentences(), heads, Words.end_id, causal)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_later_tokens_matter_only_without_the_causal_mask() -> None:
    """Padding after the end token is such a later token."""
    changed = sentences()
    changed[:3, -1] = 9
    for causal in (True, False):
        model = build({}, {"causal": causal})
        with torch.no_grad():
            same = torch.isclose(model(tokens=sentences())["text"], model(tokens=changed)["text"]).all(1)
        assert same.tolist() == [causal] * 3 + [True] * 2


def test_sincos_positions_are_the_table_of_the_paper_and_fixed() -> None:
    model = Clip(config({"positions": "sincos"}))
    table = model.visual.positional_embedding
    torch.testing.assert_close(table.double(), plain_clip.sincos(16, 4), rtol=0, atol=1e-6)
    assert not table.requires_grad
    assert Clip(config({})).visual.positional_embedding.requires_grad
    assert model.positional_embedding.requires_grad  # that of the text tower


@pytest.mark.parametrize(
    ("written", "scale", "slope"),
    [
        (math.log(1 / 0.07), 1 / 0.07, 1 / 0.07),
        (math.log(99.5), 99.5, 99.5),
        (math.log(101), 100.0, 0.0),
        (50.0, 100.0, 0.0),  # exp(50) overflows nothing
        (0.001, math.exp(0.001), math.exp(0.001)),
        (-0.5, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_temperature_is_clamped_and_then_has_no_gradient(
    written: float, scale: float, slope: float, dtype: torch.dtype
) -> None:
    model = Clip(config({})).to(dtype)
    nn.init.constant_(model.logit_scale, written)
    found = model()["scale"]
    found.sum().backward()
    assert (found.dtype, found.shape) == (torch.float32, (1,))
    if dtype == torch.bfloat16 and slope:
        stored = float(model.logit_scale.detach())  # the nearest bf16; the exponential must add no error
        assert stored == pytest.approx(written, rel=2**-8)
        scale = slope = min(math.exp(stored), 100.0)
    assert found.item() == pytest.approx(scale, rel=1e-6)
    assert model.logit_scale.grad is not None
    assert model.logit_scale.grad.item() == pytest.approx(
        slope, rel=2**-8 if dtype == torch.bfloat16 else 1e-6
    )


def test_a_new_model_starts_at_the_temperature_of_the_paper() -> None:
    assert Clip(config({}))()["scale"].item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_only_the_features_that_were_asked_for_are_there() -> None:
    model = build({})
    assert set(model()) == {"scale"}
    assert set(model(images=pictures())) == {"scale", "image"}
    assert set(model(tokens=sentences())) == {"scale", "text"}
    for name, value in model(images=pictures(), tokens=sentences()).items():
        if name != "scale":
            assert value.shape == (ROWS, 12)
            torch.testing.assert_close(value.norm(dim=1), torch.ones(ROWS).double())


def test_an_architecture_of_open_clip_is_its_own_except_for_the_keys_that_are_written() -> None:
    known = open_clip.get_model_config("ViT-B-32")["vision_cfg"]
    shape = {"width": None, "layers": None, "patch": None, "head_width": 8, "arch": "open_clip://ViT-B-32"}
    written = config(shape | {"patch": 8, "layers": 1, "pool": "avg", "positions": "sincos"}, embed=None)
    changed = {"patch_size": 8, "layers": 1, "pool_type": "avg", "pos_embed_type": "sin_cos_2d"}
    assert written["vision_cfg"] == known | changed | {"image_size": SIZE}
    assert written["embed_dim"] == open_clip.get_model_config("ViT-B-32")["embed_dim"]
    assert config({}, embed=None)["embed_dim"] == TEXT["width"]
    with pytest.raises(UserError, match="32 does not divide the image size 16"):
        config(shape)


def peers(
    arch: str, vision: dict[str, Any], text: dict[str, Any], model: dict[str, Any]
) -> tuple[Clip, nn.Module]:
    """A small model of an architecture, and open_clip's own with the same sizes and weights, both in fp64.

    `vision`, `text` and `model` are the sizes in the words of a recipe.
    """
    known = open_clip.get_model_config(arch)
    shape = {"width": None, "layers": None, "patch": None, "head_width": None, "arch": f"open_clip://{arch}"}
    section = {"vision": shape | vision, "text": text or None, **model}
    written = clip_config(
        Model.model_validate(section), Image(size=SIZE), CaptionOptions(length=LENGTH), Words()
    )
    torch.manual_seed(0)
    ours = Clip(written).double()
    randomise(ours)
    renamed = {"patch": "patch_size", "pool": "pool_type"}
    their_vision = (
        known["vision_cfg"] | {renamed.get(k, k): v for k, v in vision.items()} | {"image_size": SIZE}
    )
    tokens = {
        "vocab_size": Words.vocab_size,
        "context_length": LENGTH,
        "pad_id": Words.pad_id,
        "eos_id": Words.end_id,
    }
    if known["text_cfg"].get("pool_type", "argmax") == "argmax":
        tokens["pool_type"] = "eos"  # the tokenizer's end token is not its largest id
    their_text = {k: v for k, v in known["text_cfg"].items() if "tokenizer" not in k} | text | tokens
    theirs = open_clip.CLIP(
        model.get("embed") or known["embed_dim"], their_vision, their_text, known.get("quick_gelu", False)
    ).double()
    theirs.load_state_dict(ours.state_dict() | {"logit_scale": ours.logit_scale.detach().reshape(())})
    return ours, theirs


SMALL = {"layers": 2, "patch": 4, "width": 64}
ARCHS = ["ViT-B-32-quickgelu", "ViT-B-32", "ViT-L-14-CLIPA", "ViT-M-16-alt", "ViT-H-14-worldwide"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "text", [{"width": 16, "heads": 2, "layers": 1}, {"layers": 1, "width": 96}], ids=str
)
def test_an_architecture_computes_what_open_clip_computes(arch: str, text: dict[str, int]) -> None:
    head = open_clip.get_model_config(arch)["vision_cfg"].get("head_width", 64)
    ours, theirs = peers(arch, SMALL | {"width": 2 * head}, text, {"embed": 12})
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images=pictures())["image"],
            theirs.encode_image(pictures(), normalize=True),
            rtol=0,
            atol=1e-12,
        )
        torch.testing.assert_close(
            ours(tokens=sentences())["text"],
            theirs.encode_text(sentences(), normalize=True),
            rtol=0,
            atol=1e-12,
        )


def test_only_a_written_key_overrides_the_architecture() -> None:
    shape = {
        "width": None,
        "layers": None,
        "patch": 4,
        "head_width": None,
        "arch": "open_clip://ViT-L-14-CLIPA",
    }
    known = open_clip.get_model_config("ViT-L-14-CLIPA")
    found = config(shape)
    assert found["vision_cfg"]["pool_type"] == "avg"
    assert found["vision_cfg"]["no_ln_pre"] is found["vision_cfg"]["final_ln_after_pool"] is True
    assert (found["text_cfg"]["no_causal_mask"], found["text_cfg"]["pool_type"]) == (True, "last")
    assert found["text_cfg"]["width"] == TEXT["width"] != known["text_cfg"]["width"]
    assert config(shape | {"pool": "tok"})["vision_cfg"]["pool_type"] == "tok"
    assert config(shape, {"causal": True})["text_cfg"]["no_causal_mask"] is False
    plain = {"vision": shape, "text": None}
    alone = clip_config(Model.model_validate(plain), Image(size=SIZE), CaptionOptions(length=LENGTH), Words())
    assert {key: alone["text_cfg"][key] for key in ("width", "heads", "layers")} == {
        key: known["text_cfg"][key] for key in ("width", "heads", "layers")
    }


@pytest.mark.parametrize("arch", ["RN50", "convnext_base", "EVA02-B-16", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_an_architecture_that_is_not_a_plain_transformer_is_refused(arch: str) -> None:
    with pytest.raises(UserError, match=rf"model\.vision\.arch: open_clip://{arch} is not available yet: it"):
        config({"arch": f"open_clip://{arch}"})


def test_every_architecture_is_built_as_open_clip_builds_it_or_refused() -> None:
    """With one layer, on the meta device, which holds no numbers: the same parameters of the same shapes."""
    built = 0
    for arch in open_clip.list_models():
        if arch_mistake(f"open_clip://{arch}") is not None:
            continue
        known = open_clip.get_model_config(arch)
        vision, text = known["vision_cfg"] | {"layers": 1}, known["text_cfg"] | {"layers": 1}
        image, length = Image(size=vision["image_size"]), CaptionOptions(length=text["context_length"])
        section = {"vision": {"arch": f"open_clip://{arch}", "layers": 1}, "text": {"layers": 1}}
        text |= {"vocab_size": Words.vocab_size}
        text = {key: value for key, value in text.items() if "tokenizer" not in key}
        with torch.device("meta"):
            ours = Clip(clip_config(Model.model_validate(section), image, length, Words()))
            theirs = open_clip.CLIP(known["embed_dim"], vision, text, known.get("quick_gelu", False))
        found, expected = (
            (
                {name: p.shape for name, p in each.named_parameters() if name != "logit_scale"},
                [type(module).__name__ for module in each.modules() if "GELU" in type(module).__name__],
            )
            for each in (ours, theirs)
        )
        assert found == expected, arch
        built += 1
    assert built > 30
