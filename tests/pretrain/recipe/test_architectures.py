"""Which towers `dromos recipe check` refuses, from the names of open_clip's architectures alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from pretrain.recipe import architectures
from pretrain.recipe.load import load_recipe
from tests.support.launching import ROOT

RECIPE = """
data:
  pairs: {sources: {a: x}, batch: 4, image: {size: 224}, text: {tokenizer: clip-bpe, length: 8}}
model: {vision: {arch: open_clip://ViT-B-16}}
objective: {kind: contrastive}
optimizer: {lr: 1}
train: {steps: 1}
"""


def problems(folder: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the place and the name of the override."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    try:
        load_recipe(path, list(overrides), runnable=False)
    except UserError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("RN50", "is not available yet: it is a ResNet; supported are open_clip's plain vision transformers"),
        ("convnext_base", "it is the timm model convnext_base"),
        ("ViT-B-16-SigLIP", "it is the timm model vit_base_patch16_siglip_224"),
        ("EVA02-B-16", "it is the timm model eva02_base_patch16_clip_224"),
        ("coca_ViT-B-32", "it needs multimodal_cfg, vision_cfg.attentional_pool"),
        ("roberta-ViT-B-32", "its text tower is the transformers model roberta-base"),
        ("ViT-B-61", "open_clip has no architecture 'ViT-B-61'; did you mean 'ViT-B-16'?"),
    ],
)
def test_towers_that_cannot_be_built_are_refused(arch: str, words: str, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, f"model.vision.arch=open_clip://{arch}", "data.pairs.image.size=224")
    assert "model.vision.0.arch" in line
    assert words in line


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (
            ["model.vision.arch=null"],
            "model.vision.0",
            "needs width, layers and patch, or arch (missing: width",
        ),
        (["model.vision={width: 60, layers: 1, patch: 8}"], "model.vision.0.width", "60 is not a multiple"),
        (["model.vision={width: 64, layers: 1, patch: 8}"], "model.text", "is missing; write text"),
        (["model.text={width: 30}"], "model.text.width", "30 is not a multiple of the number of heads, 8"),
        (["model.vision.head_width=32"], "model.vision.0.head_width", "is that of open_clip://ViT-B-16"),
        (["data.pairs.image.size=30"], "data.pairs.image.size", "30 is not a multiple of the patch size (16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    overrides: list[str], key: str, words: str, tmp_path: Path
) -> None:
    assert any(f"{key}: " in line and words in line for line in problems(tmp_path, *overrides))


@pytest.mark.parametrize("arch", ["ViT-B-16", "ViT-B-32-quickgelu", "ViT-L-14-CLIPA", "ViT-H-14-worldwide"])
def test_plain_transformers_pass(arch: str, tmp_path: Path) -> None:
    assert problems(tmp_path, f"model.vision.arch=open_clip://{arch}") == []


def test_without_open_clip_an_architecture_is_left_to_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "_folder", lambda: None)
    assert problems(tmp_path, "model.vision.arch=open_clip://RN50") == []


def test_reading_an_architecture_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys; from pretrain.recipe.architectures import arch_mistake; "
        "assert arch_mistake('open_clip://RN50'); assert not {'torch', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
