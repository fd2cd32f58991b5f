"""The `model` section of a recipe: vision towers, text tower, language model, views, freezing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from pretrain.recipe.fields import Strict, parse_variant


class Vision(Strict):
    """A vision tower: a new one from width, layers and patch (or `arch`), or a trained one from `init`."""

    arch: str | None = None
    """open_clip://ARCH: build both towers as open_clip does; other keys that are written change them. Default: none.

    Only plain vision transformers, such as ViT-L-16; others are not available yet.
    """
    init: str | None = None
    """Address of a trained stage, for example flip/tuned; required in generative. Default: new weights.

    Not available yet: any address in contrastive, and in generative open_clip://ARCH/TAG and other URLs.
    """
    join: Literal["channel", "sequence"] = "channel"
    """How several towers (not available yet) are joined. Default: channel.

    channel: features are concatenated; sequence: tokens are concatenated (not available yet).
    """
    part: str | None = None
    """Part of the checkpoint to use as tower, for example qformer (not available yet).

    Default: the checkpoint's vision tower.
    """
    width: int | None = Field(None, gt=0)
    """Width of a token inside the tower. Required without `arch` and `init`."""
    layers: int | None = Field(None, gt=0)
    """Number of transformer layers. Required without `arch` and `init`."""
    head_width: int | None = Field(None, gt=0)
    """Width of one attention head; the tower has width / head_width heads. Not with `arch`. Default: 64."""
    patch: int | None = Field(None, gt=0)
    """Height and width of a patch, in pixels. Required without `arch` and `init`."""
    mlp_ratio: float | None = Field(None, gt=0)
    """Width of a layer's MLP divided by `width`. Not with `arch`. Default: 4."""
    positions: Literal["learnable", "sincos"] | None = None
    """Position embeddings: learned, or fixed 2-D sine and cosine. Default: learnable."""
    pool: Literal["tok", "avg"] | None = None
    """Image feature: the class token, or the mean over the patch tokens. Default: that of `arch`, else tok."""


class TextTower(Strict):
    """The text tower of a contrastive model."""

    width: int | None = Field(None, gt=0)
    """Width of a token inside the tower. Default: that of `vision.arch`, else 512."""
    heads: int | None = Field(None, gt=0)
    """Number of attention heads per layer. Default: that of `vision.arch`, else 8."""
    layers: int | None = Field(None, gt=0)
    """Number of transformer layers. Default: that of `vision.arch`, else 12."""
    causal: bool | None = None
    """Tokens attend only to themselves and earlier tokens. Default: that of `vision.arch`, else true."""


class Llm(Strict):
    """The language model; exactly one of `init` and `config`."""

    init: str | None = None
    """Address of trained weights: hf://ORG/NAME, a folder, RUN/STAGE (not available yet).

    Default: new weights from `config`.
    """
    config: dict[str, Any] | None = None
    """transformers config of a new model, with model_type. Default: none."""
    tokenizer: str | None = None
    """Path of a tokenizer.json or of the folder that holds it. Default: that of the streams."""


class ConnectorOptions(Strict):
    """From visual tokens to the width of the language model."""

    kind: str = "linear"
    """A name in CONNECTOR_KINDS. Default: linear."""


class LinearConnector(ConnectorOptions):
    """One linear layer."""

    kind: Literal["linear"] = "linear"
    """linear. Default: linear."""
    norm: bool = False
    """A LayerNorm behind the layer, as in SPHINX. Default: false."""


# `model.connector.kind` -> class of the section. `CONNECTORS` in pretrain/models/connectors/__init__.py builds them.
CONNECTOR_KINDS: dict[str, type[ConnectorOptions]] = {"linear": LinearConnector}


def parse_connector(value: Any) -> Any:
    """A `connector` section as the keys of its kind. Raises ValidationError at the key that is wrong."""
    return parse_variant(value, "kind", CONNECTOR_KINDS, default="linear")


class Views(Strict):
    """Views into which an image is cut for the towers (not available yet)."""

    size: int = 224
    """Height and width of a view, in pixels. Default: 224."""
    tiles: str = "1x1"
    """Rows x columns of tiles. Default: 1x1."""
    global_: Literal["first", "last", "only"] = Field("only", alias="global")
    """The downscaled whole image comes before the tiles, after them, or alone. Default: only."""


def parse_towers(value: Any) -> Any:
    """One tower may be written without a list."""
    return [value] if isinstance(value, dict | Vision) else value


class Model(Strict):
    """The model that is trained."""

    embed: int | None = Field(None, gt=0)
    """Width of the joint embedding of a contrastive model. Default: that of `vision.arch`, else `text.width`."""
    vision: Annotated[list[Vision], BeforeValidator(parse_towers)] | None = None
    """The vision tower, or a list of towers (more than one: not available yet). Default: none (text only)."""
    text: TextTower | None = None
    """The text tower of a contrastive model. Default: that of `vision.arch`, else none."""
    llm: Llm | None = None
    """The language model of a generative model. Default: none."""
    connector: Annotated[SerializeAsAny[ConnectorOptions], BeforeValidator(parse_connector)] | None = None
    """What connects vision towers and language model; required where there are both. Default: none."""
    views: Views | None = None
    """Views of an image (not available yet). Default: the whole image once."""
    freeze: list[str] = Field(default_factory=list)
    """What is not trained: regular expressions that match whole names of parameters. Default: none.

    vision, text, connector and llm are short names of these parts. Each expression must match something. generative
    needs vision if it has a tower: training the tower is not available yet.
    """
