"""`MergeSpec`: the schema of a merge in YAML or flags, and its conversion to a Request and a plan.

`load_spec` recognises mergekit files; `replan` plans again from the record in merge.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Plan
from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
from pretrain.merge.mergekit.yaml_file import MergekitFile, is_mergekit, parse
from pretrain.merge.planning import checkpoint_windows
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.planning.output_layout import SHARD_SIZE, parse_size
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import Request, Rule, make_request
from pretrain.recipe.fields import Strict
from pretrain.recipe.schema_errors import describe
from pretrain.recipe.yaml_file import load_yaml

Vocabulary = Literal["first", "intersect", "pad", "union"]


def _range(value: Any) -> Any:
    """`0:32` -> (0, 32)."""
    if not isinstance(value, str):
        return value
    first, colon, last = value.partition(":")
    if not colon or not first.strip().isdigit() or not last.strip().isdigit():
        raise ValueError(f"{value!r}: write FIRST:LAST with two integers")
    return (int(first), int(last))


def _list(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Range = Annotated[tuple[int, int], BeforeValidator(_range)]


class InputSpec(Strict):
    """One input model; a plain address is short for `{path: ADDRESS}`."""

    path: str = Field(description="Address: RUN/STAGE[@STEP], a folder or file, s3://, hf://.")
    weight: float | None = Field(
        None, description="Its weight: a share (linear, slerp) or a factor (methods with a base)."
    )
    density: float | None = Field(None, description="TIES, DARE: fraction of its differences that is kept.")


class RuleSpec(Strict):
    """How tensors whose name matches are handled; the first rule that matches wins."""

    match: str = Field(
        "", description="Regular expression, searched in the whole name; empty matches every name."
    )
    layers: Range | None = Field(
        None, description="FIRST:END, layer numbers that the rule applies to, END excluded."
    )
    beta: float | None = Field(None, description="Weight of the first of two inputs.")
    weights: list[float] | None = Field(None, description="One share or factor per input.")
    t: float | None = Field(None, description="slerp: weight of the second input.")
    curve: list[float] | None = Field(
        None, description="Two inputs: betas at equal distances over `layers`, interpolated linearly."
    )
    exclude: bool = Field(False, description="Not mixed, like tensors outside `only`.")
    copy_from: str | None = Field(
        None, description="Copied from an input (A, B, ... or its address) or from another address."
    )

    def to_rule(self) -> Rule:
        """As plain data; raises UserError if both beta and weights are set."""
        weights = tuple(self.weights) if self.weights is not None else None
        if self.beta is not None:
            if weights is not None:
                raise UserError(f"rule {self.match!r}: write beta or weights, not both")
            if not 0 <= self.beta <= 1:
                raise UserError(
                    f"rule {self.match!r}: beta {self.beta:g} is not between 0 and 1; to extrapolate, write weights "
                    f"{self.beta:g} and {1 - self.beta:g}"
                )
            weights = (self.beta, 1.0 - self.beta)
        curve = tuple(self.curve) if self.curve is not None else None
        return Rule(self.match, weights, self.t, self.exclude, self.copy_from, self.layers, curve)


class WindowSpec(Strict):
    """Checkpoints of one run instead of `inputs`; needs one of last, steps, samples, tokens."""

    run: str = Field(description="RUN/STAGE.")
    last: int | None = Field(None, description="Number of newest complete checkpoints.")
    steps: Range | None = Field(None, description="FIRST:LAST, both included.")
    samples: Range | None = Field(None, description="FIRST:LAST samples consumed, summed over all streams.")
    tokens: Range | None = Field(None, description="FIRST:LAST tokens consumed, padding included.")
    every: int = Field(1, description="Only checkpoints whose step is a multiple of it.")
    schedule: checkpoint_windows.Schedule = Field(
        "uniform", description="Weights of the checkpoints (pretrain.merge.planning.checkpoint_windows)."
    )
    decay: float | None = Field(
        None, description=f"Only for schedule ema; default: {checkpoint_windows.DECAY}."
    )


class MergeSpec(Strict):
    """A merge: theta = beta * A + (1 - beta) * B by default. Paths are relative to the working directory."""

    method: Literal["linear", "soup", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = Field(
        "linear", description="`soup` is linear with equal weights."
    )
    inputs: list[str | InputSpec] = Field(
        default_factory=list, description="Addresses, or maps with weights."
    )
    window: WindowSpec | None = Field(None, description="Checkpoints of one run instead of `inputs`.")
    base: str | None = Field(
        None, description="Model to which task arithmetic, TIES and DARE add differences."
    )
    beta: float | None = Field(None, description="Weight of the first of two inputs, from 0 to 1.")
    weights: list[float] | None = Field(None, description="One per input.")
    t: float | None = Field(None, description="slerp: weight of the second input, 1 - beta.")
    lambda_: float | None = Field(None, alias="lambda", description="Factor of the summed differences.")
    density: Annotated[list[float] | None, BeforeValidator(_list)] = Field(
        None,
        description="TIES, DARE: fraction of the differences that is kept; one value, or one per input.",
    )
    normalize: bool | None = Field(
        None, description="Divide by the sum of the weights; default: true for linear and ties."
    )
    rescale: bool | None = Field(None, description="DARE: divide kept entries by the density; default: true.")
    seed: int | None = Field(None, ge=0, description="Seed of DARE's random draw.")
    only: str | None = Field(None, description="Regular expression of the tensors that are mixed.")
    exclude: str | None = Field(None, description="Regular expression of tensors that are not mixed.")
    rules: list[RuleSpec] = Field(
        default_factory=list, description="By name; the first rule that matches wins."
    )
    copy_rest: str | None = Field(
        None, description="Model that tensors outside the mix are copied from: A, B, ... or an address."
    )
    dtype: str | None = Field(None, description="Dtype of the mixed tensors; default: that of the inputs.")
    max_shard_size: Annotated[int, BeforeValidator(parse_size)] = Field(
        SHARD_SIZE, description="Bytes of tensors in one file, such as 5GB."
    )
    vocabulary: Vocabulary | None = Field(None, description="Rule for inputs of different vocabularies.")
    key: str | None = Field(
        None, description="State dict to read in torch files that hold several, such as model_ema."
    )

    def to_request(self) -> Request:
        """As plain data, with windows expanded. Raises UserError for contradictory options."""
        addresses, weights = self._inputs()
        return make_request(
            addresses,
            beta=self.beta,
            weights=weights,
            t=self.t,
            method=self.method,
            base=self.base,
            density=self._densities(),
            scale=self.lambda_,
            normalize=self.normalize,
            rescale=self.rescale,
            seed=self.seed,
            rules=[rule.to_rule() for rule in self.rules],
            only=self.only,
            exclude=self.exclude,
            copy_rest=self.copy_rest,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            vocabulary=self.vocabulary,
            key=self.key,
            notes=tuple(checkpoint_windows.notes(addresses)) if self.window is not None else (),
        )

    def _inputs(self) -> tuple[list[str], list[float] | None]:
        if self.window is None:
            weights = [entry.weight for entry in self.inputs if isinstance(entry, InputSpec)]
            return [_path(entry) for entry in self.inputs], self._per_input("weight", weights, self.weights)
        given = [name for name in ("inputs", "beta", "weights", "t") if getattr(self, name) not in (None, [])]
        if given:
            raise UserError(f"a window sets inputs and weights itself; leave out {' and '.join(given)}")
        if self.method != "linear":
            raise UserError(f"a window is a linear merge; it cannot use method {self.method}")
        return checkpoint_windows.expand(checkpoint_windows.Window(**dict(self.window)))

    def _densities(self) -> list[float] | None:
        densities = [entry.density for entry in self.inputs if isinstance(entry, InputSpec)]
        return self._per_input("density", densities, self.density)

    def _per_input(
        self, name: str, at_inputs: list[float | None], for_merge: list[float] | None
    ) -> list[float] | None:
        """The values set at each input, else the list of the spec."""
        values = [value for value in at_inputs if value is not None]
        if not values:
            return for_merge
        if for_merge is not None:
            raise UserError(f"{name} is set both at the inputs and for the merge; set it in one place")
        if len(values) != len(self.inputs):
            raise UserError(
                f"{name} is set at {len(values)} of {len(self.inputs)} inputs; set it at every input"
            )
        return values


def _path(entry: str | InputSpec) -> str:
    return entry if isinstance(entry, str) else entry.path


def merge_spec(
    values: Mapping[str, Any], where: str, lines: Mapping[tuple[str, ...], int] | None = None
) -> MergeSpec:
    """Validate `values`; raises one UserError that lists all errors. `lines`: key -> line in the file."""
    try:
        return MergeSpec.model_validate(values)
    except ValidationError as error:
        messages = []
        for detail in error.errors():
            # pydantic adds the branches of `str | InputSpec` to the location; the user did not write them.
            key = tuple(str(part) for part in detail["loc"] if part not in ("str", "InputSpec"))
            if detail["loc"][-1:] == ("str",):
                continue
            line = (lines or {}).get(key)
            place = f"{where}:{line}" if line else where
            messages.append(f"{place}: {'.'.join(key)}: {describe(MergeSpec, key, detail)}")
        raise UserError("\n".join(messages)) from None


def load_spec(path: str | Path) -> MergeSpec | MergekitFile:
    """Read a YAML file: a mergekit file if it has `merge_method`, else a dromos spec."""
    document = load_yaml(path, "spec")
    if is_mergekit(document.values):
        return parse(document.path, document.values)
    return merge_spec(document.values, document.path, document.lines)


def prepare_spec(
    spec: MergeSpec | MergekitFile,
    max_shard_size: int | None = None,
    seed: int | None = None,
    key: str | None = None,
) -> tuple[Plan, OpenedInputs]:
    """Open and plan a spec. `max_shard_size`, `seed` and `key` come from the command line.

    A dromos spec may have them as keys; setting one twice raises UserError. A mergekit file has none of them.
    """
    if isinstance(spec, MergekitFile):
        opened = open_mergekit(spec, key=key)
        return plan_mergekit(spec, opened, max_shard_size or SHARD_SIZE, seed or 0, key), opened
    flags = {"max_shard_size": max_shard_size, "seed": seed, "key": key}
    flags = {name: value for name, value in flags.items() if value is not None}
    if twice := sorted(flags.keys() & spec.model_fields_set):
        raise UserError(f"{', '.join(twice)}: also set in the spec; set it in one place")
    (plan,), opened = prepare(spec.model_copy(update=flags).to_request())
    return plan, opened


def replan(record: dict[str, Any], run_dir: Path | None = None) -> tuple[Plan, OpenedInputs]:
    """Plan again from `Plan.request`, which merge.json stores as `asked`."""
    if "mergekit" in record:
        file = parse(record["file"], record["mergekit"])
        key = record.get("key")
        opened = open_mergekit(file, run_dir, key)
        return plan_mergekit(file, opened, record["max_shard_size"], record["seed"], key), opened
    (plan,), opened = prepare(Request.from_dict(record), run_dir=run_dir)
    return plan, opened
