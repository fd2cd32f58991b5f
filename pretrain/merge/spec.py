"""A merge as a YAML file or flags say it, checked: MergeSpec becomes a Request; mergekit's files are told apart."""

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
from pretrain.merge.planning.request import Request, Rule, request
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
        raise ValueError(f"{value!r}: write FIRST:LAST, two whole numbers")
    return (int(first), int(last))


def _list(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Range = Annotated[tuple[int, int], BeforeValidator(_range)]


class InputSpec(Strict):
    """One model that is merged; a bare address is `{path: ADDRESS}`."""

    path: str = Field(description="Address: RUN/STAGE[@STEP], a folder or file, s3://, hf://.")
    weight: float | None = Field(
        None, description="Its share (linear, slerp) or factor (methods with a base)."
    )
    density: float | None = Field(None, description="TIES, DARE: the share of its differences that is kept.")


class RuleSpec(Strict):
    """What is done with tensors in whose name `match` is found; the first rule that matches wins."""

    match: str = Field("", description="Regular expression, found anywhere in the name; empty: every name.")
    layers: Range | None = Field(None, description="FIRST:END, the layer numbers that the rule holds for.")
    beta: float | None = Field(None, description="Of two inputs, the weight of the first.")
    weights: list[float] | None = Field(None, description="One share or factor for each input.")
    t: float | None = Field(None, description="slerp: the share of the second input.")
    curve: list[float] | None = Field(
        None, description="Of two inputs: betas at equal distances over `layers`, linear in between."
    )
    exclude: bool = Field(False, description="Not mixed: as outside `only`.")
    copy_from: str | None = Field(
        None, description="Copied from an input (A, B, ... or its address) or elsewhere."
    )

    def rule(self) -> Rule:
        """As plain data; UserError where beta and weights contradict each other."""
        weights = tuple(self.weights) if self.weights is not None else None
        if self.beta is not None:
            if weights is not None:
                raise UserError(f"rule {self.match!r}: give beta or weights, not both")
            if not 0 <= self.beta <= 1:
                raise UserError(
                    f"rule {self.match!r}: beta {self.beta:g} is not between 0 and 1; to extrapolate give weights, "
                    f"{self.beta:g} and {1 - self.beta:g}"
                )
            weights = (self.beta, 1.0 - self.beta)
        curve = tuple(self.curve) if self.curve is not None else None
        return Rule(self.match, weights, self.t, self.exclude, self.copy_from, self.layers, curve)


class WindowSpec(Strict):
    """Checkpoints of one run in place of `inputs`; give one of last, steps, samples, tokens."""

    run: str = Field(description="RUN/STAGE.")
    last: int | None = Field(None, description="So many of the newest complete checkpoints.")
    steps: Range | None = Field(None, description="FIRST:LAST, both included.")
    samples: Range | None = Field(None, description="FIRST:LAST samples consumed, of all streams together.")
    tokens: Range | None = Field(None, description="FIRST:LAST tokens consumed, padding included.")
    every: int = Field(1, description="Only checkpoints whose step this number divides.")
    schedule: checkpoint_windows.Schedule = Field(
        "uniform", description="How much of each (pretrain.merge.planning.checkpoint_windows)."
    )
    decay: float | None = Field(
        None, description=f"Of schedule ema; {checkpoint_windows.DECAY} where it is not given."
    )


class MergeSpec(Strict):
    """A merge: theta = beta * A + (1 - beta) * B by default. Addresses are relative to where the command runs."""

    method: Literal["linear", "soup", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = Field(
        "linear", description="`soup` is linear with equal weights."
    )
    inputs: list[str | InputSpec] = Field(
        default_factory=list, description="Addresses, or maps with weights."
    )
    window: WindowSpec | None = Field(None, description="Checkpoints of one run in place of `inputs`.")
    base: str | None = Field(None, description="What task arithmetic, TIES and DARE add differences to.")
    beta: float | None = Field(None, description="Of two inputs, the weight of the first, from 0 to 1.")
    weights: list[float] | None = Field(None, description="One for each input.")
    t: float | None = Field(None, description="slerp: the share of the second input, 1 - beta.")
    lambda_: float | None = Field(None, alias="lambda", description="Factor of the summed differences.")
    density: Annotated[list[float] | None, BeforeValidator(_list)] = Field(
        None,
        description="TIES, DARE: the share of differences that is kept; one for all, or one for each input.",
    )
    normalize: bool | None = Field(
        None, description="Divide by the sum of the weights; default: linear and ties."
    )
    rescale: bool | None = Field(None, description="DARE: divide what is kept by the density; default true.")
    seed: int | None = Field(None, ge=0, description="Of DARE's random entries.")
    only: str | None = Field(None, description="Regular expression of the tensors that are mixed.")
    exclude: str | None = Field(None, description="Regular expression of tensors that are not mixed.")
    rules: list[RuleSpec] = Field(default_factory=list, description="By name; the first that matches wins.")
    copy_rest: str | None = Field(None, description="Whose tensors the rest is: A, B, ... or an address.")
    dtype: str | None = Field(None, description="Type of the mixed tensors; default: that of the inputs.")
    max_shard_size: Annotated[int, BeforeValidator(parse_size)] = Field(
        SHARD_SIZE, description="Bytes of tensors in one file, such as 5GB."
    )
    vocabulary: Vocabulary | None = Field(
        None, description="Inputs of different vocabularies: tokens of the output."
    )

    def request(self) -> Request:
        """As plain data, windows expanded. Raises UserError for whatever contradicts itself."""
        addresses, weights = self._inputs()
        return request(
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
            rules=[rule.rule() for rule in self.rules],
            only=self.only,
            exclude=self.exclude,
            copy_rest=self.copy_rest,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            vocabulary=self.vocabulary,
            notes=tuple(checkpoint_windows.notes(addresses)) if self.window is not None else (),
        )

    def _inputs(self) -> tuple[list[str], list[float] | None]:
        if self.window is None:
            own = [entry.weight for entry in self.inputs if isinstance(entry, InputSpec)]
            return [_path(entry) for entry in self.inputs], self._own("weight", own, self.weights)
        given = [name for name in ("inputs", "beta", "weights", "t") if getattr(self, name) not in (None, [])]
        if given:
            raise UserError(f"a window says inputs and weights itself; leave {' and '.join(given)} out")
        if self.method != "linear":
            raise UserError(f"a window is a linear merge; method {self.method} does not go with it")
        return checkpoint_windows.expand(checkpoint_windows.Window(**dict(self.window)))

    def _densities(self) -> list[float] | None:
        own = [entry.density for entry in self.inputs if isinstance(entry, InputSpec)]
        return self._own("density", own, self.density)

    def _own(self, name: str, own: list[float | None], given: list[float] | None) -> list[float] | None:
        """What stands at each input, or what stands once for all."""
        found = [value for value in own if value is not None]
        if not found:
            return given
        if given is not None:
            raise UserError(f"{name} stands at the inputs and once for all; give it in one place")
        if len(found) != len(self.inputs):
            raise UserError(f"{name} stands at {len(found)} of {len(self.inputs)} inputs; give it at each")
        return found


def _path(entry: str | InputSpec) -> str:
    return entry if isinstance(entry, str) else entry.path


def merge_spec(
    values: Mapping[str, Any], where: str, lines: Mapping[tuple[str, ...], int] | None = None
) -> MergeSpec:
    """`values` checked; one UserError for all that is wrong with them."""
    try:
        return MergeSpec.model_validate(values)
    except ValidationError as error:
        told = []
        for one in error.errors():
            # Branches of `str | InputSpec` name themselves in the place; a person did not write them.
            key = tuple(str(part) for part in one["loc"] if part not in ("str", "InputSpec"))
            if one["loc"][-1:] == ("str",):
                continue
            line = (lines or {}).get(key)
            place = f"{where}:{line}" if line else where
            told.append(f"{place}: {'.'.join(key)}: {describe(MergeSpec, key, one)}")
        raise UserError("\n".join(told)) from None


def load_spec(path: str | Path) -> MergeSpec | MergekitFile:
    """Read a YAML file: mergekit's where it has `merge_method`, else one of our own."""
    document = load_yaml(path, "spec")
    if is_mergekit(document.values):
        return parse(document.path, document.values)
    return merge_spec(document.values, document.path, document.lines)


def prepare_spec(
    spec: MergeSpec | MergekitFile, max_shard_size: int | None = None, seed: int | None = None
) -> tuple[Plan, OpenedInputs]:
    """Plan what a spec asks. `max_shard_size` and `seed` stand for what the file does not say.

    A merge of our own has both among its keys; mergekit takes them from its command line.
    """
    if isinstance(spec, MergekitFile):
        opened = open_mergekit(spec)
        return plan_mergekit(spec, opened, max_shard_size or SHARD_SIZE, seed or 0), opened
    more = {"max_shard_size": max_shard_size, "seed": seed}
    given = {name: value for name, value in more.items() if value is not None}
    if (twice := sorted(given.keys() & spec.model_fields_set)) and given:
        raise UserError(f"{', '.join(twice)}: stands in the spec too; give it in one place")
    (plan,), opened = prepare(spec.model_copy(update=given).request())
    return plan, opened


def replan(asked: dict[str, Any], run_dir: Path | None = None) -> tuple[Plan, OpenedInputs]:
    """The plan again from what a plan's `asked` and a record in merge.json say."""
    if "mergekit" in asked:
        from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
        from pretrain.merge.mergekit.yaml_file import parse

        file = parse(asked["file"], asked["mergekit"])
        opened = open_mergekit(file, run_dir)
        return plan_mergekit(file, opened, asked["max_shard_size"], asked["seed"]), opened
    (plan,), opened = prepare(Request.from_dict(asked), run_dir=run_dir)
    return plan, opened
