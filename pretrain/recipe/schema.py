"""The typed recipe: every section and key with meaning, unit and default. Unknown keys are errors.

A length (`Duration`) is written `500` or `500 steps`, `51M samples`, `0.03 epochs`; a count as `128M` or `12.8B`.
An address names weights: a stage, RUN/STAGE[@STEP], a path, s3://, hf:// or open_clip:// (pretrain/run/address.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from pretrain.recipe.fields import Count, Duration, Length, Strict
from pretrain.recipe.kinds.base import ObjectiveOptions, Options
from pretrain.recipe.kinds.parse import parse_objective
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.evaluation import Evaluation
from pretrain.recipe.sections.model import Model


class Run(Strict):
    """Name, folder and seed of a run."""

    name: str = "run"
    """Name of the run; its folder is runs/NAME unless `dir` is set. Default: run."""
    dir: str | None = None
    """Path of the run folder, relative to the working directory. Default: runs/NAME."""
    seed: int = Field(0, ge=0)
    """Seed of sample order, crops, masks and initial weights. Default: 0."""
    accept_change: bool = False
    """Resume although the data, the shares of its sources or the batch changed. Default: false."""


class Group(Strict):
    """Parameters with settings of their own; a parameter belongs to the first group that matches it."""

    match: str
    """Regular expression that matches whole names of parameters, or vision, text, connector, llm. Required."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; the rate has the shape of the schedule, `final_lr` included. Default: from `lr_scale`."""
    lr_scale: float | None = Field(None, gt=0)
    """Factor on the learning rate of the stage; at most one of `lr` and `lr_scale`. Default: 1."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay of its matrices; vectors never decay. Default: `optimizer.weight_decay`."""
    warmup: Duration | None = None
    """Length of its linear warm-up. Default: `schedule.warmup`."""

    @model_validator(mode="after")
    def _one_rate(self) -> Group:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("write lr or lr_scale, not both")
        return self

    def scale(self, peak: float) -> float:
        """The group's learning rate divided by that of the stage, whose peak is `peak`."""
        return self.lr / peak if self.lr is not None else self.lr_scale or 1.0


class Optimizer(Strict):
    """AdamW; exactly one of `lr` and `lr_per_256`."""

    kind: Literal["adamw"] = "adamw"
    """The only optimizer of this version. Default: adamw."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate. Default: from `lr_per_256`."""
    lr_per_256: float | None = Field(None, gt=0)
    """Peak learning rate for a global batch of 256 rows; it is multiplied by (largest batch / 256). Default: none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments. Default: [0.9, 0.95]."""
    eps: float = 1e-8
    """Term that is added to the denominator of the update. Default: 1e-8."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors, biases, norms and single tokens do not decay. Default: 0."""
    clip: float = Field(1.0, ge=0)
    """Upper limit of the global gradient norm; 0 switches clipping off. Default: 1."""
    groups: list[Group] | None = None
    """Groups of parameters with their own rate, weight decay or warm-up. Default: none."""

    @model_validator(mode="after")
    def _one_rate(self) -> Optimizer:
        if self.lr is not None and self.lr_per_256 is not None:
            raise ValueError("write lr or lr_per_256, not both")
        return self


class Schedule(Strict):
    """Learning rate over the training."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up, from the peak to `final_lr`; constant: no decay. Default: cosine."""
    warmup: Duration = Field(default_factory=lambda: Length(value=0))
    """Length W of the linear warm-up; step s (from 0) has the rate peak * (s + 1) / (W + 1). Default: 0 steps."""
    final_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the training, the same unit as the peak. Default: 0."""


class Train(Strict):
    """Length of the training: exactly one of steps, samples, epochs (of the objective's main stream)."""

    steps: Count | None = Field(None, gt=0)
    """Optimizer steps. Default: from samples or epochs."""
    samples: Count | None = Field(None, gt=0)
    """Rows of the main stream, over all ranks; rounded up to whole steps. Default: none."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the main stream; rounded up to whole steps. Default: none."""
    micro_batch: int | None = Field(None, gt=0)
    """Rows of a rank in one forward and backward pass. Default: all rows of the rank."""
    hours: float | None = Field(None, gt=0)
    """Save a checkpoint and exit with code 75 after this many hours. Default: no limit."""
    max_skipped: int = Field(3, ge=0)
    """Steps in a row that may be skipped because a loss or the gradient is not finite; one more stops the run. A
    skipped step changes neither weights nor optimizer state; learning rate and data advance. Default: 3."""


class Engine(Strict):
    """DeepSpeed and numerics."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 shards nothing, 1 optimizer states, 2 also gradients, 3 also weights. Default: 1."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of forward and backward; master weights are fp32. Default: fp32."""
    deterministic: bool = False
    """Use only deterministic kernels of PyTorch. Default: false."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory (not available yet). Default: false."""
    offload: Literal["cpu"] | None = None
    """cpu: keep optimizer states in host memory (not available yet). Default: on the device."""
    compile: bool = False
    """Compile the model with torch.compile (not available yet). Default: false."""


class Cache(Strict):
    """Node-local cache of what the ranks of a node read from object stores."""

    folder: str | None = None
    """Folder on a local disk of the node. Default: the environment variable DROMOS_CACHE, else a folder in /tmp."""
    gigabytes: float | None = Field(None, ge=0)
    """Upper limit of its size, in GB; 0: no cache. Default: half of the free space of the disk, up to 100."""


class Loader(Strict):
    """Reading and decoding of the training data."""

    backend: Literal["local", "ray"] = "local"
    """Where batches are built: processes beside each rank, or Ray actors over the nodes. Default: local."""
    workers: int = Field(2, ge=0)
    """Worker processes per rank; 0 builds batches in a thread of the rank. Default: 2."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop when more than this fraction of a source's samples was replaced in the last 100 steps. Default: 0.01.

    A source that served fewer than 200 samples in these steps is not judged (MIN_SAMPLES in
    pretrain/train/bad_samples.py).
    """
    max_bad_in_shard: int = Field(200, ge=1)
    """Stop when a shard has this many unusable samples in one epoch. Default: 200."""
    stall_warn: float = Field(30.0, gt=0)
    """Seconds after which a stalled read or decode is logged. Default: 30."""
    stall_error: float = Field(600.0, gt=0)
    """Seconds after which a stalled worker is killed. Its work is retried once on another worker; a second stall is an
    error. Default: 600."""
    cache: Cache = Field(default_factory=Cache)
    """The node-local cache."""


class Checkpoint(Strict):
    """Checkpoints during the training; one is always saved at its end."""

    every: Duration = Field(default_factory=lambda: Length(value=1000))
    """Length between two checkpoints. Default: 1000 steps."""
    keep: int = Field(3, ge=1)
    """Number of newest complete checkpoints that are kept. Default: 3."""


def parse_list(value: Any) -> Any:
    """One text may be written without a list."""
    return [value] if isinstance(value, str) else value


class TrainStage(Strict):
    """One resolved training stage: the recipe's defaults, overlaid with the stage's own values."""

    kind: Literal["train"] = "train"
    """train or merge. Default: train."""
    init: str | None = None
    """Address of the initial weights; optimizer, schedule and data start new. Default: random weights."""
    init_allow: Annotated[list[str], BeforeValidator(parse_list)] | None = None
    """Regular expressions of names: parts of a module that `init` may lack, or have unused. Default: none.

    Whole modules may always differ, for example a connector after a stage without images; all of it is printed.
    """
    continue_: str | None = Field(None, alias="continue")
    """Address of a stage to continue with weights, optimizer, schedule and data position. Default: none."""
    data: dict[str, Stream] = Field(default_factory=dict)
    """Stream name -> stream. Required: at least one."""
    # Sections: the docstrings of their classes say what they hold.
    model: Model = Field(default_factory=Model)
    objective: Annotated[SerializeAsAny[ObjectiveOptions], BeforeValidator(parse_objective)]
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    train: Train
    engine: Engine = Field(default_factory=Engine)
    loader: Loader = Field(default_factory=Loader)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Evaluation = Field(default_factory=Evaluation)

    def options(self, kind: type[Options]) -> Options:
        """The `objective` section as that of a kind. Raises TypeError for a stage of another kind."""
        if not isinstance(self.objective, kind):
            raise TypeError(f"objective.kind is {self.objective.kind}, not that of {kind.__name__}")
        return self.objective


class MergeStage(Strict):
    """One resolved merge stage: the weighted sum of its inputs, tensor by tensor."""

    kind: Literal["merge"]
    """merge. Required."""
    method: Literal["linear"] = "linear"
    """The only method of a stage; `dromos merge` has more. Default: linear."""
    inputs: dict[str, float] = Field(min_length=2)
    """Address -> weight of the input. Required: at least two."""
    only: str | None = None
    """Regular expression of the names of the tensors that are merged. Default: all."""
    copy_rest: str | None = None
    """Address from which the other tensors are copied. Default: none."""
    eval: Evaluation = Field(default_factory=Evaluation)
    """Evaluation of the merged weights."""


class Recipe(Strict):
    """A recipe with every stage resolved: `run` and `prepare` belong to the run, all other keys to its stages."""

    run: Run = Field(default_factory=Run)
    prepare: Literal["demo"] | None = None
    """Data set that `dromos data prepare` writes for this recipe. Default: none."""
    stages: dict[str, Annotated[TrainStage | MergeStage, Field(discriminator="kind")]]
    """Stage name -> resolved stage, in the order in which they run."""
