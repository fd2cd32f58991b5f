"""The typed recipe: every key a user may write, with its meaning and default; unknown keys are refused."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from data_pipeline.batch_sizes import Batches
from data_pipeline.captions import CaptionSpec
from data_pipeline.errors import UserError

SCALE = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LENGTH = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kMBT]?)\s*(steps?|samples?|epochs?)?\s*$")


class Strict(BaseModel):
    """Base of every section: read-only, and a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Length(Strict):
    """A duration: `500` or `500 steps`, `51M samples`, `0.03 epochs`."""

    value: float = Field(ge=0)
    unit: Literal["steps", "samples", "epochs"] = "steps"

    def __str__(self) -> str:
        value = int(self.value) if self.value.is_integer() else self.value
        return f"{value!r} {self.unit}"


def parse_length(value: Any, unit: str = "steps") -> Any:
    """`51M samples` -> Length(51e6, "samples"); a bare number is in `unit`."""
    if isinstance(value, Length | dict):
        return value
    if isinstance(value, bool):
        raise ValueError("a length is a number with steps, samples or epochs")
    if isinstance(value, int | float):
        return Length(value=float(value), unit=unit)  # type: ignore[arg-type]
    found = LENGTH.match(str(value))
    if not found:
        raise ValueError(
            f"{value!r} is no length; write for example '1000 steps', '51M samples', '0.5 epochs'"
        )
    number, scale, word = found.groups()
    name = {"step": "steps", "sample": "samples", "epoch": "epochs"}.get(word or "", word or unit)
    return Length(value=float(number) * SCALE[scale], unit=name)  # type: ignore[arg-type]


def parse_count(value: Any) -> Any:
    """`12.8B` -> 12800000000."""
    if isinstance(value, str):
        found = LENGTH.match(value)
        if not found or found.group(3):
            raise ValueError(f"{value!r} is no number; write for example 128M or 12.8B")
        return round(float(found.group(1)) * SCALE[found.group(2)])
    return value


def parse_batch(value: Any) -> Any:
    """Rows, or first step -> rows in the order of steps."""
    rows = list(value.values()) if isinstance(value, dict) else [value]
    for number in rows:
        if isinstance(number, bool) or not re.fullmatch(r"\s*-?[0-9]+\s*", str(number)):
            raise ValueError(f"must be a whole number of rows, or a map first step -> rows, not {number!r}")
        if int(number) < 1:
            raise ValueError(f"must be greater than 0, not {number!r}")
    if not isinstance(value, dict):
        return int(value)
    try:
        steps = {int(step): int(number) for step, number in value.items()}
        Batches.of(steps)
    except (TypeError, ValueError, UserError):
        told = ", ".join(map(str, value)) or "missing"
        raise ValueError(
            f"its first steps are {told}; they must begin with 0 and be whole numbers, as in {{0: 1024, 1000: 4096}}"
        ) from None
    return dict(sorted(steps.items()))


Duration = Annotated[Length, BeforeValidator(parse_length), PlainSerializer(str, return_type=str)]
Count = Annotated[int, BeforeValidator(parse_count)]


class Run(Strict):
    """What the run is called and where it writes."""

    name: str = Field(
        "run", description="Name of the run; the run folder is runs/NAME unless dir says otherwise."
    )
    dir: str | None = Field(None, description="The run folder itself, relative to the working directory.")
    seed: int = Field(0, ge=0, description="Seed of order, crops, masks and initial weights.")
    accept_change: bool = Field(False, description="Continue although the data or its mixture changed.")


class Source(Strict):
    """One dataset in a stream: a folder of tars, a brace pattern of tars, or a manifest."""

    path: str = Field(description="Folder, or pattern such as data/{00000..00031}.tar; local or s3://.")
    weight: float | None = Field(None, gt=0, description="Share of the stream; absent: by number of samples.")
    repeat: float | None = Field(None, gt=0, description="Multiplies the size that the weight is taken from.")
    cap: Count | None = Field(None, gt=0, description="Bounds the size that the weight is taken from.")
    max_epochs: float | None = Field(None, gt=0, description="The source ends after this many passes.")
    view: str | None = Field(None, description="View of the source, made by `dromos data view`, to train on.")


def parse_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Image(Strict):
    """How an image becomes pixels."""

    size: int = Field(224, gt=0, description="Side of the square fed to the tower, in pixels.")
    crop: tuple[float, float] = Field(
        (1.0, 1.0), description="Range of the crop's area, as a share of the image."
    )
    flip: bool = Field(False, description="Mirror half of the images, left to right.")
    max_pixels: Count = Field(
        25_000_000,
        gt=0,
        le=178_000_000,
        description="Larger images, such as 50M, count as unusable; decoding takes 3 bytes a pixel.",
    )
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="Of RGB in 0..1."
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="Of RGB in 0..1."
    )


class Captions(Strict):
    """Which captions of a sample come into question; each time one of them is drawn."""

    from_: list[str] = Field(
        alias="from",
        description="Members that hold a caption or a list of them: txt, json.caption, json.all_captions.",
    )
    scores: list[str | None] = Field(
        default_factory=list, description="The json.FIELD with the scores of each member in `from`, or null."
    )
    top: int | None = Field(
        None, ge=1, description="Only so many with the best scores; without scores, so many from the front."
    )

    @model_validator(mode="after")
    def _fits(self) -> Captions:
        CaptionSpec(tuple(self.from_), tuple(self.scores), self.top)
        return self


class Text(Strict):
    """How a caption becomes tokens."""

    tokenizer: str = Field("clip-bpe", description="clip-bpe, or a folder or file with a tokenizer.json.")
    length: int = Field(32, gt=2, description="Tokens in a row: start token, caption, end token, padding.")
    captions: Captions | None = Field(
        None, description="Which of several captions is taken; absent: txt, or one of caption in json."
    )


class Stream(Strict):
    """A named mixture of sources that an objective consumes, and its global batch."""

    sources: dict[str, Annotated[Source, BeforeValidator(parse_source)]] = Field(
        default_factory=dict, description="Name -> path or {path, weight, repeat, cap, max_epochs, view}."
    )
    batch: Annotated[int | dict[int, int], BeforeValidator(parse_batch)] = Field(
        256,
        description="Rows of the global batch, over all ranks; or first step -> rows, as {0: 1024, 1000: 4096}.",
    )
    lanes: int | None = Field(
        None, gt=0, description="Fixed fractions of the rows; default: largest divisor of batch up to 1024."
    )
    share_by: Literal["size", "sqrt"] = Field(
        "size", description="Sources without a weight share the rows by size, or by the square root of it."
    )
    order_as: str | None = Field(None, description="Stage whose order, crops and masks this stream shares.")
    length: int | None = Field(
        None, gt=1, description="Tokens of a packed text sequence; only for text streams."
    )
    image: Image | None = Field(None, description="Absent in a text stream.")
    text: Text | None = Field(None, description="Absent in a text stream, which is packed beforehand.")

    @property
    def batches(self) -> Batches:
        return Batches.of(self.batch)


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
