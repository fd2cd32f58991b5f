"""The typed recipe: every key a user may write, with its meaning and default; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pretrain.recipe.data import Stream, parse_source
from pretrain.recipe.fields import Count, Duration, Length, Strict


class Run(Strict):
    """What the run is called and where it writes."""

    name: str = Field(
        "run", description="Name of the run; the run folder is runs/NAME unless dir says otherwise."
    )
    dir: str | None = Field(None, description="The run folder itself, relative to the working directory.")
    seed: int = Field(0, ge=0, description="Seed of order, crops, masks and initial weights.")
    accept_change: bool = Field(False, description="Continue although the data or its mixture changed.")


class Vision(Strict):
    """A vision tower: trained here (width, layers, ... or arch) or taken from elsewhere (init)."""

    arch: str | None = Field(None, description="open_clip://ARCH: the tower's shape from open_clip.")
    init: str | None = Field(
        None, description="Address of trained weights: flip/tuned, a path, open_clip://ARCH/TAG."
    )
    join: Literal["channel", "sequence"] = Field("channel", description="How several towers are joined.")
    part: str | None = Field(None, description="Part of the checkpoint to use, for example qformer.")
    width: int | None = Field(None, gt=0)
    layers: int | None = Field(None, gt=0)
    head_width: int = Field(64, gt=0)
    patch: int | None = Field(None, gt=0, description="Side of a patch in pixels.")
    mlp_ratio: float = 4.0
    positions: Literal["learnable", "sincos"] = Field(
        "learnable", description="sincos: fixed 2-D sine and cosine."
    )
    pool: Literal["tok", "avg"] = Field("tok", description="Class token, or the mean over patches.")


class TextTower(Strict):
    """The text tower of a contrastive model."""

    width: int = 512
    heads: int = 8
    layers: int = 12
    causal: bool = True


class Llm(Strict):
    """The language model: from an address, or new from a transformers config."""

    init: str | None = Field(None, description="Address of weights: hf://ORG/NAME, a folder, RUN/STAGE.")
    config: dict[str, Any] | None = Field(
        None, description="transformers config with model_type, for a new model."
    )
    tokenizer: str | None = Field(None, description="Folder or file with a tokenizer.json.")


class Views(Strict):
    """Into which views an image is cut before the towers see it."""

    size: int = 224
    tiles: str = "1x1"
    global_: Literal["first", "last", "only"] = Field("only", alias="global")


def parse_towers(value: Any) -> Any:
    return [value] if isinstance(value, dict | Vision) else value


class Model(Strict):
    """What is trained."""

    embed: int | None = Field(None, gt=0, description="Width of the joint embedding of a contrastive model.")
    vision: Annotated[list[Vision], BeforeValidator(parse_towers)] | None = None
    text: TextTower | None = None
    llm: Llm | None = None
    views: Views | None = None
    freeze: list[str] = Field(default_factory=list, description="Parts that do not train: vision, text, llm.")


class Objective(Strict):
    """What the losses are."""

    kind: Literal["flip", "sphinx", "instruct"]
    image_mask: float = Field(0.0, ge=0, lt=1, description="Share of patches that the tower does not see.")
    text_mask: float = Field(0.0, ge=0, lt=1, description="Share of caption tokens that are dropped.")
    weights: dict[str, float] | None = Field(None, description="Weight of each stream's token-mean loss.")
    template: str | None = Field(None, description="How dialogues become text, for example vicuna.")


class Optimizer(Strict):
    """AdamW and its hyper-parameters."""

    kind: Literal["adamw"] = "adamw"
    lr: float | None = Field(None, gt=0, description="Peak learning rate.")
    lr_per_256: float | None = Field(
        None, gt=0, description="Peak learning rate for a batch of 256, scaled linearly."
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = Field(
        1.0, ge=0, description="Global gradient norm is clipped to this; 0 switches clipping off."
    )

    @model_validator(mode="after")
    def _one_rate(self) -> Optimizer:
        if self.lr is not None and self.lr_per_256 is not None:
            raise ValueError("write lr or lr_per_256, not both")
        return self


class Schedule(Strict):
    """Learning rate over the training."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Duration = Field(default_factory=lambda: Length(value=0), description="Linear warm-up from 0.")
    final_lr: float = Field(0.0, ge=0, description="Learning rate at the end.")


class Train(Strict):
    """How long; exactly one of steps, samples, epochs (of the objective's main stream)."""

    steps: Count | None = Field(None, gt=0)
    samples: Count | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    micro_batch: int | None = Field(
        None, gt=0, description="Rows of a rank that pass at once; absent: all of them."
    )
    hours: float | None = Field(None, gt=0, description="Save and stop (exit code 75) after this many hours.")


class Engine(Strict):
    """DeepSpeed and numerics."""

    zero: Literal[0, 1, 2, 3] = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = False
    activation_checkpointing: bool = False
    offload: Literal["cpu"] | None = None
    compile: bool = False


class Cache(Strict):
    """Where each node keeps what its ranks read of object stores."""

    folder: str | None = Field(
        None,
        description="A folder of the user's own, on a disk of the node; absent: DROMOS_CACHE, or in /tmp.",
    )
    gigabytes: float | None = Field(
        None, ge=0, description="At most; absent: half of what is free there, up to 100. 0: no cache."
    )


class Loader(Strict):
    """Who reads and decodes."""

    backend: Literal["local", "ray"] = "local"
    workers: int = Field(2, ge=0, description="Processes a rank; 0 reads inside the rank.")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="More replaced samples than this stop the run."
    )
    max_bad_in_shard: int = Field(
        200, ge=1, description="So many unusable samples of one shard in one epoch stop the run."
    )
    stall_warn: float = Field(
        30.0,
        gt=0,
        description="Seconds after which a read or a decode that does not end is named in the log.",
    )
    stall_error: float = Field(
        600.0,
        gt=0,
        description="Seconds after which it is ended and tried by another worker; then it is an error.",
    )
    cache: Cache = Field(default_factory=Cache)


class Checkpoint(Strict):
    """When to save and how many to keep."""

    every: Duration = Field(default_factory=lambda: Length(value=1000))
    keep: int = Field(3, ge=1)


class ZeroShot(Strict):
    """Zero-shot classification of one labelled source."""

    path: str
    classes: dict[str, str] = Field(
        default_factory=dict, description="Label as it stands in the json member -> name in the prompt."
    )
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    label: str = Field("label", description="Key of the json member that holds the label.")


class Perplexity(Strict):
    """Mean negative log-likelihood a token on one held-out source."""

    path: str
    stream: str | None = Field(
        None, description="Stream whose image and text settings apply; absent: packed text."
    )
    length: int | None = Field(None, gt=1, description="Tokens of a packed sequence; only without stream.")


class Evaluation(Strict):
    """Held-out figures, during training and at its end."""

    every: Duration | None = Field(None, description="Absent: only at the end of the stage.")
    batch: int = Field(256, gt=0)
    zero_shot: dict[str, Annotated[ZeroShot, BeforeValidator(parse_source)]] = Field(default_factory=dict)
    perplexity: dict[str, Perplexity] = Field(default_factory=dict)


class TrainStage(Strict):
    """One resolved training stage: the recipe's defaults with the stage's own values over them."""

    kind: Literal["train"] = "train"
    init: str | None = Field(None, description="Address whose weights start this stage, nothing else.")
    continue_: str | None = Field(
        None, alias="continue", description="Address that this stage continues entirely."
    )
    data: dict[str, Stream] = Field(default_factory=dict)
    model: Model = Field(default_factory=Model)
    objective: Objective
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    train: Train
    engine: Engine = Field(default_factory=Engine)
    loader: Loader = Field(default_factory=Loader)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Evaluation = Field(default_factory=Evaluation)


class MergeStage(Strict):
    """One resolved merge stage: theta = sum of weight x input."""

    kind: Literal["merge"]
    method: Literal["linear"] = "linear"
    inputs: dict[str, float] = Field(min_length=2, description="Address -> weight.")
    only: str | None = Field(None, description="Regular expression of the tensors that are mixed.")
    copy_rest: str | None = Field(None, description="Address that the other tensors come from.")
    eval: Evaluation = Field(default_factory=Evaluation)


class Recipe(Strict):
    """A recipe with every stage resolved: `run` and `prepare` belong to the run, the rest to its stages."""

    run: Run = Field(default_factory=Run)
    prepare: Literal["demo"] | None = Field(
        None, description="What `dromos data prepare` makes for this recipe."
    )
    stages: dict[str, Annotated[TrainStage | MergeStage, Field(discriminator="kind")]]
