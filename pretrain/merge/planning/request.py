"""`Request`: a validated merge request as plain data, built from flags, a spec file or Python."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import METHODS, NATIVE_BASE_METHODS, letter
from pretrain.merge.planning.output_layout import SHARD_SIZE
from pretrain.weights.dtypes import FLOATS

# Methods with a base for which --normalize divides the weights by their sum; the others divide entry by entry.
NORMALIZED_BY_SUM = ("task_arithmetic", "dare_linear")
SPARSE_METHODS = tuple(name for name in NATIVE_BASE_METHODS if name != "task_arithmetic")
DARE_METHODS = ("dare_linear", "dare_ties")


@dataclass(frozen=True)
class Rule:
    """How tensors whose name matches are handled; the first rule that matches wins.

    match:     regular expression, searched in the whole name.
    weights:   one per input, instead of the request's.
    t:         slerp: weight of the second input.
    exclude:   not mixed; copied from `copy_rest`, or from any input if all inputs agree.
    copy_from: copied from this input (address or letter) or from another address.
    layers:    layer numbers [start, stop) that the rule applies to.
    curve:     for two inputs: weights of the first at equal distances over `layers`, interpolated linearly.
    """

    match: str
    weights: tuple[float, ...] | None = None
    t: float | None = None
    exclude: bool = False
    copy_from: str | None = None
    layers: tuple[int, int] | None = None
    curve: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Request:
    """A merge request with all defaults filled in, before any input is opened.

    inputs:     addresses (pretrain.run.address).
    weights:    one resolved weight per input.
    method:     one of pretrain.merge.merge_plan.METHODS.
    base:       address of the model that methods with a base add differences to.
    densities:  one per input: fraction of the entries that TIES and DARE keep.
    scale:      lambda: factor of the summed differences.
    normalize:  divide by the sum of the weights; TIES: of the weights that agree at each entry. For linear merges
                `weights` are already normalized; weights of rules are normalized later.
    rescale:    DARE: divide kept entries by the density.
    seed:       of DARE's random draw.
    only, exclude, rules, copy_rest, dtype, max_shard_size, vocabulary, key: as in pretrain.merge.spec.
    notes:      additional notes for the plan.
    """

    inputs: tuple[str, ...]
    weights: tuple[float, ...]
    method: str = "linear"
    base: str | None = None
    densities: tuple[float, ...] = ()
    scale: float = 1.0
    normalize: bool = True
    rescale: bool = True
    seed: int = 0
    only: str | None = None
    exclude: str | None = None
    rules: tuple[Rule, ...] = ()
    copy_rest: str | None = None
    dtype: str | None = None
    max_shard_size: int = SHARD_SIZE
    vocabulary: str | None = None
    key: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, under the keys of a spec, as JSON types."""
        found = _plain(self)
        found.pop("notes", None)
        found["rules"] = [_plain(rule) for rule in self.rules]
        if set(self.densities) <= {1.0}:
            found["densities"] = []
        if self.method != "slerp":
            found["normalize"] = self.normalize
        return {KEYS.get(name, name): value for name, value in found.items() if value != []}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Request:
        """The request that `to_dict` returned; validates nothing."""
        names = {key: name for name, key in KEYS.items()}
        given = _tuples({names.get(key, key): value for key, value in record.items()})
        rules = tuple(Rule(**_tuples(rule)) for rule in record.get("rules", []))
        return cls(**({"densities": (1.0,) * len(record["inputs"])} | given | {"rules": rules}))


KEYS = {"scale": "lambda", "densities": "density"}  # field -> its key in a spec, if they differ


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


def _plain(record: Request | Rule) -> dict[str, Any]:
    changed = {
        f.name: getattr(record, f.name) for f in fields(record) if getattr(record, f.name) != f.default
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def make_request(
    inputs: Sequence[str],
    *,
    beta: float | None = None,
    weights: Sequence[float] | None = None,
    t: float | None = None,
    method: str = "linear",
    base: str | None = None,
    density: float | Sequence[float] | None = None,
    scale: float | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    seed: int | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    **rest: Any,
) -> Request:
    """Validate a merge request and fill in its defaults. Raises UserError for contradictory or invalid options.

    method:    one of METHODS, or `soup`: linear with equal weights.
    weights:   required for linear and slerp (or `beta`); default for methods with a base: 1 per input.
    normalize: default true for linear and ties, as in mergekit.
    rest:      other fields of Request; None means the default.
    """
    # 1. Options that contradict the method.
    count = len(inputs)
    _check_method(inputs, method, base)
    _check_flag("--lambda", scale, NATIVE_BASE_METHODS, method)
    _check_flag("--density", density, SPARSE_METHODS, method)
    _check_flag("--seed", seed, DARE_METHODS, method)
    _check_flag("--rescale", rescale, DARE_METHODS, method)
    _check_flag("--t", t, ("slerp",), method)
    if method == "slerp" and count != 2:
        raise UserError(f"--method slerp merges two inputs, but {count} are given")
    if method == "slerp" and normalize is not None:
        raise UserError("--normalize is for linear merges and methods with a base; slerp takes --t or --beta")
    if normalize is None:
        normalize = method in ("linear", "soup", "slerp", "ties")
    # 2. Patterns and rules.
    for name in ("only", "exclude"):
        if rest.get(name) is not None:
            compiled(rest[name], name)
    for rule in rules:
        check_rule(rule, count, method)
    # 3. The request with its defaults.
    return Request(
        inputs=tuple(inputs),
        weights=input_weights(count, method, beta, weights, t, normalize),
        method="linear" if method == "soup" else method,
        base=base,
        densities=input_densities(count, density),
        scale=_finite("--lambda", 1.0 if scale is None else scale),
        normalize=normalize,
        rescale=rescale is not False,
        seed=seed or 0,
        rules=tuple(rules),
        dtype=check_dtype(dtype),
        **{name: value for name, value in rest.items() if value is not None},
    )


def _check_method(inputs: Sequence[str], method: str, base: str | None) -> None:
    """Raises UserError for an unknown method, too few inputs, and a missing or useless base."""
    count = len(inputs)
    if method not in (*METHODS, "soup"):
        raise UserError(f"--method {method}: choose one of {', '.join(METHODS)}, soup")
    based = method in NATIVE_BASE_METHODS
    if count < (1 if based else 2):
        raise UserError(f"a merge needs two inputs or more, but {count} is given")
    if based and base is None:
        raise UserError(f"--method {method} adds differences to a base; name it with --base")
    if base is not None and not based:
        raise UserError(f"--base is for {', '.join(NATIVE_BASE_METHODS)}; --method {method} has no base")
    if base is not None and (base in inputs or base in {letter(i) for i in range(count)}):
        raise UserError(
            f"--base {base} is also an input; its difference to itself is 0, so leave it out of the inputs"
        )


def _check_flag(flag: str, value: object, methods: Sequence[str], method: str) -> None:
    if value is not None and method not in methods:
        raise UserError(f"{flag} is for {', '.join(methods)}; it has no effect with --method {method}")


def _finite(flag: str, value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"{flag} {value}: must be a finite number")
    return float(value)


def check_rule(rule: Rule, count: int, method: str) -> None:
    """Raises UserError unless a rule has exactly one action, and one that the method supports."""
    where = f"rule {rule.match!r}"
    compiled(rule.match, where)
    actions = [n for n in ("weights", "t", "copy_from", "curve") if getattr(rule, n) is not None]
    actions += ["exclude"] if rule.exclude else []
    if len(actions) != 1:
        found = " and ".join(actions) or "no action"
        raise UserError(
            f"{where} has {found}; it needs exactly one of beta, weights, t, curve, exclude, copy_from"
        )
    if rule.t is not None and method != "slerp":
        raise UserError(f"{where}: t is only for slerp; write beta, the weight of the first input")
    if rule.t is not None and not 0 <= rule.t <= 1:
        raise UserError(f"{where}: t {rule.t:g} is not between 0 and 1")
    if rule.weights is not None:
        finite_weights(count, rule.weights, where)
    if rule.curve is not None:
        if rule.layers is None:
            raise UserError(f"{where}: a curve needs layers, such as 0:32")
        if count != 2 or method not in ("linear", "slerp"):
            raise UserError(f"{where}: a curve needs two inputs and method linear or slerp")
        if not rule.curve or not all(0 <= value <= 1 for value in rule.curve):
            raise UserError(f"{where}: a curve must be a list of betas between 0 and 1")
    if rule.layers is not None and not 0 <= rule.layers[0] < rule.layers[1]:
        raise UserError(
            f"{where}: layers {rule.layers[0]}:{rule.layers[1]} is empty; write FIRST:END, such as 0:32"
        )


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a regular expression; raises UserError with its place `where`."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a valid regular expression: {error}") from None


def check_dtype(dtype: str | None) -> str | None:
    """`bf16`, `float32`, `BF16`, ... in safetensors spelling; None stays None."""
    if dtype is None:
        return None
    names = {
        "BFLOAT16": "BF16",
        "FLOAT16": "F16",
        "FP16": "F16",
        "FLOAT32": "F32",
        "FP32": "F32",
        "FLOAT64": "F64",
        "FP64": "F64",
    }
    found = names.get(dtype.upper(), dtype.upper())
    if found not in FLOATS:
        raise UserError(f"--dtype {dtype}: choose one of bf16, fp16, fp32, fp64")
    return found


def input_weights(
    count: int,
    method: str,
    beta: float | None,
    weights: Sequence[float] | None,
    t: float | None,
    normalize: bool,
) -> tuple[float, ...]:
    """The resolved weights of the inputs for a method, from at most one of `beta`, `weights` and `t`."""
    given = [
        name for name, value in (("--beta", beta), ("--weights", weights), ("--t", t)) if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"set the weights of the inputs once, not with {' and '.join(given)}")
    if method == "soup":
        if given:
            raise UserError(
                f"--method soup weighs all inputs equally; leave out {given[0]}, or use --method linear"
            )
        return (1.0 / count,) * count
    if method in NATIVE_BASE_METHODS:
        if beta is not None:
            raise UserError("--beta is for linear and slerp; write --weights with one factor per input")
        factors = finite_weights(count, weights) if weights is not None else (1.0,) * count
        if normalize and method in NORMALIZED_BY_SUM and abs(math.fsum(factors)) < 1e-8:
            raise UserError(
                f"--normalize divides by the sum of the weights, which is 0 for "
                f"{', '.join(f'{w:g}' for w in factors)}; leave it out, or change --weights"
            )
        return factors
    if t is not None:
        if not 0 <= t <= 1:
            raise UserError(f"--t {t:g}: the weight of the second input must be between 0 and 1")
        return (1.0 - float(t), float(t))
    if weights is not None and not normalize:
        return finite_weights(count, weights)
    return resolve_weights(count, beta, weights)


def input_densities(count: int, density: float | Sequence[float] | None) -> tuple[float, ...]:
    """One density per input; a single value applies to all inputs."""
    listed = (
        [1.0 if density is None else float(density)] if not isinstance(density, Sequence) else list(density)
    )
    if len(listed) == 1:
        listed *= count
    if len(listed) != count:
        raise UserError(
            f"--density: {len(listed)} numbers for {count} inputs; write one for all, or one per input"
        )
    if not all(0 < value <= 1 for value in listed):
        raise UserError(f"--density {', '.join(f'{v:g}' for v in listed)}: must be above 0 and at most 1")
    return tuple(float(value) for value in listed)


def finite_weights(count: int, weights: Sequence[float], where: str = "--weights") -> tuple[float, ...]:
    """`weights` as floats; raises UserError unless there is one finite number per input."""
    if len(weights) != count:
        raise UserError(f"{where}: {len(weights)} weights for {count} inputs; write one per input")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"{where}: weights {', '.join(f'{w:g}' for w in weights)}: must be finite numbers")
    return tuple(float(weight) for weight in weights)


def resolve_weights(count: int, beta: float | None, weights: Sequence[float] | None) -> tuple[float, ...]:
    """fp64 weights of `count` inputs: (beta, 1 - beta) for two inputs, or `weights` divided by their sum.

    Weights whose sum is 1 within 1e-9 are not divided.
    """
    if (beta is None) == (weights is None):
        raise UserError(
            "set the weights of the inputs: --beta for two inputs, or --weights with one number per input "
            "(--method soup weighs all equally)"
        )
    if beta is not None:
        if count != 2:
            raise UserError(
                f"--beta is for two inputs, but {count} are given; write --weights with {count} numbers"
            )
        if not 0 <= beta <= 1:
            raise UserError(
                f"--beta {beta:g}: must be between 0 and 1; to extrapolate, write --weights {beta:g},{1 - beta:g}"
            )
        return (float(beta), 1.0 - float(beta))
    shares = [float(weight) for weight in weights or ()]
    if len(shares) != count:
        raise UserError(f"{len(shares)} weights for {count} inputs; write one per input")
    return normalized(shares)


def normalized(shares: Sequence[float], where: str = "weights") -> tuple[float, ...]:
    """Shares divided by their sum, unless it is 1 within 1e-9."""
    total = math.fsum(shares)
    if not all(math.isfinite(share) for share in shares) or abs(total) < 1e-9:
        raise UserError(
            f"{where} {', '.join(f'{s:g}' for s in shares)}: must be finite numbers whose sum is not 0"
        )
    return tuple(shares) if abs(total - 1) <= 1e-9 else tuple(share / total for share in shares)
